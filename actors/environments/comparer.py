"""math-verify in a process of its own: whether two answers mean the same.

math-verify's own time limits are signals, which only a main thread gets, and no signal reaches Python while it computes
one huge number. So answers are compared by a child that can be killed: JSON lines in, one word out.
"""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

from actors.environments import comparison
from actors.environments.comparison import READY, Verdict
from common.errors import ComponentFailure

LIMIT_S = 5.0
"""Longest wait for one comparison; the child takes no more processor time than this either, should nobody wait."""
START_LIMIT_S = 50.0
"""Longest wait for a child to import sympy."""


class Comparer:
    """The child, started when it is first needed and anew after its end. Safe between threads."""

    def __init__(self, *, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The child's, None while there is none."""
        return self._child.pid if self._child else None

    def compare(self, gold: str, answer: str) -> Verdict:
        """`gold` as LaTeX without dollar signs, `answer` as a text that math-verify finds an answer in.

        A child that was killed by others is started again once; one that takes too long is killed.
        """
        request = json.dumps({"gold": gold, "answer": answer}).encode() + b"\n"
        with self._lock:
            for _ in range(2):
                with suppress(BrokenPipeError, EOFError):
                    return self._ask(request)
                if self._end() == -signal.SIGPROF:
                    break
        return Verdict.UNREADABLE

    def close(self) -> None:
        """End the child; a later comparison starts another."""
        with self._lock:
            self._end()

    def _ask(self, request: bytes) -> Verdict:
        child = self._child or self._start()
        assert child.stdin
        child.stdin.write(request)
        child.stdin.flush()
        try:
            return Verdict(_read_word(child, self._limit_s))
        except TimeoutError:
            self._end()
            return Verdict.UNREADABLE

    def _start(self) -> subprocess.Popen[bytes]:
        """Raises ComponentFailure where the child cannot be started."""
        # -P: its folder has a math.py
        command = [sys.executable, "-P", "-W", "ignore", comparison.__file__, str(self._limit_s)]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        atexit.register(self.close)
        try:
            word = _read_word(self._child, START_LIMIT_S)
        except (EOFError, TimeoutError) as error:
            word = type(error).__name__
        if word != READY:
            raise ComponentFailure(f"{' '.join(command)}: got {word} (exit code {self._end()}), expected {READY!r}")
        return self._child

    def _end(self) -> int | None:
        """Kill the child; its exit code."""
        child, self._child = self._child, None
        if not child:
            return None
        child.kill()
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            child.communicate(timeout=self._limit_s)
        atexit.unregister(self.close)
        return child.returncode


COMPARER = Comparer()
"""The one of this process."""


def _read_word(child: "subprocess.Popen[bytes]", limit_s: float) -> str:
    """A line of the child. Raises EOFError where it has ended, TimeoutError where there is none within the limit."""
    assert child.stdout
    deadline, line = time.monotonic() + limit_s, b""
    poll = select.poll()
    poll.register(child.stdout, select.POLLIN)
    while not line.endswith(b"\n"):
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError
        part = os.read(child.stdout.fileno(), 100)
        if not part:
            raise EOFError
        line += part
    return line.decode().strip()
