"""Commands of chord-rl as child processes, which have ended when whoever started them goes on."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from common.local.supervisor import QUIET_THREADS

HURRY_S = 2.0
"""From SIGTERM to the second one: what a stopped run would still save is of no use."""
STOP_S = 60.0
"""Longest time from there to SIGKILL."""


class CommandFailed(Exception):
    """It ended badly, or not at all; the message is one line."""


def run_command(module: str, *arguments: str, log: Path, limit_s: float) -> str:
    """Run it to its end; returns what it printed. Raises CommandFailed."""
    with started(module, *arguments, log=log) as process:
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired as error:
            raise CommandFailed(f"{module} went on for {limit_s:.0f} s, expected its end (log: {log})") from error
    require_success(module, process, log)
    return log.read_text()


def require_success(name: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Raises CommandFailed with the last line of its log where it ended with anything but 0."""
    if process.returncode:
        raise CommandFailed(f"{name} ended with {process.returncode}: {last_line(log)} (log: {log})")


@contextmanager
def started(module: str, *arguments: str, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a session of its own; on leaving it has ended, in peace where there is time for that."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            env={**QUIET_THREADS, **os.environ, "PYTHONUNBUFFERED": "1"}, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, another one for at once, and SIGKILL to it and all that it started when STOP_S have passed.

    What was started in the background ignores SIGINT.
    """
    if process.poll() is not None:
        return
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(HURRY_S)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        for member in family:
            if member.is_running():
                member.kill()
        process.wait()


def last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it wrote nothing"
