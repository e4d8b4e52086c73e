"""A lab machine in a folder: the program as if it had been built there, and install.sh with DESTDIR."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.deploy.tools import ROOT

VENV = "/opt/chord-rl/0.1.0"
INSTALL = ROOT / "deploy" / "systemd" / "install.sh"


def prepare_program(root: Path, venv: str = VENV) -> None:
    """What `install.sh --build` would bring: the commands, here those of the environment that runs the tests."""
    folder = root / venv.lstrip("/") / "bin"
    folder.mkdir(parents=True)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    for name, target in scripts.items():
        module = target.partition(":")[0].removesuffix(".__main__")
        script = folder / name
        script.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -P -m {module} "$@"\n')
        script.chmod(0o755)


def install(root: Path, *options: str, **environment: str) -> None:
    done = subprocess.run(
        [INSTALL, *options], env={**os.environ, "DESTDIR": str(root), **environment}, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def uninstall(root: Path, **environment: str) -> None:
    install(root, "uninstall", **environment)
