"""Commits what a finished run has changed, so that a machine that dies takes no results along."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.compare.commands import CommandFailed

GIT_S = 60.0
"""Longest time of one git command: a hook, or a key that asks for a password, must not hold up the next run."""


def commit(home: Path, paths: Sequence[Path], message: str) -> None:
    """Commit `paths` of the checkout `home` and nothing else. Raises CommandFailed with git's last line."""
    names = [str(path) for path in paths]
    for command in (["add", "--", *names], ["commit", "--quiet", "-m", message, "--only", "--", *names]):
        try:
            done = subprocess.run(
                ["git", "-C", str(home), *command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                check=False, timeout=GIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise CommandFailed(f"git {command[0]} went on for {GIT_S:.0f} s, expected its end") from error
        if done.returncode:
            said = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
            raise CommandFailed(f"git {command[0]} ended with {done.returncode}: {said[-1]}")
