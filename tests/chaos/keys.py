"""Keys for the components of a site, and one that was stolen; made by chord-keys."""

import subprocess
import sys
from pathlib import Path

NAMES = ("learner", "actor-0", "actor-1", "actor-2", "evaluator", "far-0", "far-1", "hostile")


def make_keys(folder: Path) -> Path:
    """The folder for network.keys."""
    command = [sys.executable, "-m", "common.keys", "create", str(folder), *NAMES]
    subprocess.run(command, check=True, capture_output=True)
    return folder
