"""Keys for the components of a site, and one that was stolen; made by chord-keys, where the project has it."""

import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
NAMES = ("learner", "actor-0", "actor-1", "actor-2", "evaluator", "far-0", "far-1", "hostile")


def make_keys(folder: Path) -> Path | None:
    """The folder for network.keys; None where there is no chord-keys yet."""
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    if "chord-keys" not in scripts:
        return None
    module = scripts["chord-keys"].partition(":")[0].removesuffix(".__main__")
    subprocess.run([sys.executable, "-m", module, "create", str(folder), *NAMES], check=True, capture_output=True)
    return folder
