"""An environment of an installed package: a module, and the metadata that pip would write for its entry point."""

from pathlib import Path


def install_environment(folder: Path, module: str, entry: str) -> Path:
    """A folder for PYTHONPATH with `module`, the text of my_package, and `entry`, "NAME = my_package:CLASS"."""
    metadata = folder / "my_package-1.0.dist-info"
    metadata.mkdir(parents=True)
    (folder / "my_package.py").write_text(module)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[chord_rl.environments]\n{entry}\n")
    return folder
