"""chord-local on a real pseudo-terminal: the whole way from the first screen to the last line."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from tests.runs import PATIENCE_S, QUIET, import_experts, read_lines, write_config

ENTER, LEAVE = "\x1b[?1049h", "\x1b[?1049l"
"""The other screen of a terminal."""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Terminal:
    """chord-local on a terminal of 24 rows of 80; what it wrote is read as it comes."""

    def __init__(self, config: Path, *arguments: str, **environment: str) -> None:
        mine, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        command = [sys.executable, "-m", "common.local", "--config", str(config), *arguments]
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, **QUIET, "TERM": "xterm-256color", **environment},
        )  # fmt: skip
        os.close(theirs)
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read, args=(mine,), daemon=True)
        self._reader.start()

    def _read(self, terminal: int) -> None:
        try:
            while part := os.read(terminal, 1 << 16):
                self._written += part
        except OSError:
            pass  # the other end is closed
        os.close(terminal)

    @property
    def written(self) -> str:
        return self._written.decode(errors="replace")

    def finish(self, limit_s: float = PATIENCE_S) -> str:
        try:
            assert self.process.wait(limit_s) == 0, self.written[-3000:]
        finally:
            self.process.kill()
        self._reader.join(10)
        return self.written


def rows(frame: str) -> list[str]:
    """What a person sees of one drawing."""
    return CONTROL.sub("", frame).replace("\r", "").split("\n")


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    path = write_config(
        tmp_path, tiny_model, actor={"engine": "simulated", "tokens_per_s": 10.0},  # time enough for all to be seen
        learner={"num_steps": 6, "num_threads": 1}, eval={"every_steps": 3, "num_problems": 4},
    )  # fmt: skip
    import_experts(path)
    return path


def test_the_run_has_one_screen_of_the_terminal_and_gives_it_back_with_the_summary(config: Path) -> None:
    written = Terminal(config).finish()
    before, _, rest = written.partition(ENTER)
    screen, _, after = rest.partition(LEAVE)
    assert "starting learner, actor-0, actor-1, evaluator" in before
    frames = [rows(frame) for frame in screen.split("\x1b[H")[1:]]
    assert len(frames) >= 3
    assert all(len(frame) <= 24 and all(len(row) <= 80 for row in frame) for frame in frames)
    assert any("learner: starting" in row for frame in frames[:3] for row in frame)
    seen = "\n".join("\n".join(frame) for frame in frames)
    assert re.search(r"step [1-6]/6", seen)
    assert re.search(r"│ actor-1 +serving", seen)
    assert re.search(r"│ reward +[▁▂▃▄▅▆▇█]", seen)
    assert re.search(r"│ held-out accuracy +[▁▂▃▄▅▆▇█]", seen)
    told = CONTROL.sub("", after)
    assert "accuracy of version 6 on chain_sum" in told
    assert "6 optimizer steps in" in told
    assert len(read_lines(config.parent / "run" / "metrics.jsonl")) == 6


def test_a_terminal_without_a_cursor_or_without_greek_gets_plain_lines(config: Path) -> None:
    written = Terminal(config, "learner.num_steps=2", TERM="dumb", PYTHONIOENCODING="ascii").finish()
    assert ENTER not in written
    assert re.search(r"^step 2/2  reward .*  \? \d", written, re.MULTILINE)
