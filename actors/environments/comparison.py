"""The program of the process that compares two answers by math-verify: JSON lines in, one word out.

Run by its path, so it imports nothing of this package; `actors/environments/comparer.py` is its parent.
"""

import json
import os
import resource
import signal
import sys
from enum import StrEnum
from typing import Any

STEP_LIMIT_S = 2
"""math-verify's limit for reading one answer, and for comparing one pair."""
MAX_MEMORY_BYTES = 4 << 30
"""Address space of the process."""
READY = "ready"
"""What it says first."""


class Verdict(StrEnum):
    """What became of a comparison."""

    SAME = "same"
    DIFFERENT = "different"
    UNREADABLE = "unreadable"
    """The answer is no mathematics, or is too hard to compare."""


def _serve(limit_s: float) -> None:
    """The child: answer requests until standard input ends, as it does when the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(os.dup(1), "w", buffering=1) as replies:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what libraries print is no reply
        _verdict("1", "$2$")  # so that the first comparison need not wait for imports
        print(READY, file=replies)
        for line in sys.stdin:
            signal.setitimer(signal.ITIMER_PROF, limit_s)  # ends the process, whatever it is doing
            verdict = _verdict(**json.loads(line))
            signal.setitimer(signal.ITIMER_PROF, 0)
            print(verdict, file=replies)


def _verdict(gold: str, answer: str) -> Verdict:
    from math_verify import parse, verify

    found: list[Any] = parse(answer, parsing_timeout=STEP_LIMIT_S)
    if not found:
        return Verdict.UNREADABLE
    try:
        is_same = verify(parse(f"${gold}$", parsing_timeout=STEP_LIMIT_S), found, timeout_seconds=STEP_LIMIT_S)
    except Exception:
        return Verdict.UNREADABLE
    if is_same:
        return Verdict.SAME
    return Verdict.UNREADABLE if all(isinstance(value, str) for value in found) else Verdict.DIFFERENT


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
