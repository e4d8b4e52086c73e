"""The versions in deploy/docker/constraints-*.txt: `python -m tests.deploy.pins` resolves them anew."""

import os
import shutil
import subprocess
from pathlib import Path

from tests.deploy.tools import ROOT, TOOLS

TARGETS = ("cpu", "gpu")
"""Of the Dockerfile; each is an extra of the project."""
IMAGE = ("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_36")
"""Debian 12's C library."""


class Unresolved(Exception):
    """What the resolver said."""


def path_of(target: str) -> Path:
    return ROOT / "deploy" / "docker" / f"constraints-{target}.txt"


def pins(target: str) -> list[str]:
    return [line for line in path_of(target).read_text().splitlines() if not line.startswith("#")]


def resolve(target: str, *, keeping: Path | None = None) -> list[str]:
    """What pip would install for a target under its constraints; where `keeping` names a copy of them, what it would
    install today, with changes only where they must be."""
    uv = shutil.which("uv", path=f"{TOOLS / 'python' / 'bin'}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        raise FileNotFoundError("uv: `make .tools/.ready` installs it")
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--extra", target, *IMAGE]
    command += ["--output-file", str(keeping)] if keeping else ["--constraints", str(path_of(target))]
    command.append("pyproject.toml")
    if target == "cpu":  # the GPU build wants no CPU build of torch, however near it lies
        for option, variable in (("--find-links", "PIP_FIND_LINKS"), ("--extra-index-url", "PIP_EXTRA_INDEX_URL")):
            command += [word for place in os.environ.get(variable, "").split() for word in (option, place)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise Unresolved(done.stderr)
    return (keeping.read_text() if keeping else done.stdout).splitlines()


def main() -> None:
    for target in TARGETS:
        path, head = path_of(target), path_of(target).read_text().splitlines()
        copy = path.with_suffix(".new")
        try:
            copy.write_text("\n".join(pins(target)) + "\n")
            lines = [line for line in head if line.startswith("#")] + resolve(target, keeping=copy)
        finally:
            copy.unlink(missing_ok=True)
        path.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
