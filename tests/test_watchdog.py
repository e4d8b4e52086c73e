"""The watchdog, in processes of its own: what it ends, what it forgives, and what a supervisor hears."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from common.local.signs import Signs
from common.watchdog import NOTIFY_SOCKET

STUCK = """
import threading
from common.watchdog import Watchdog
watchdog = Watchdog()
watch = watchdog.watch("the learner's inbox", limit_s=600)
with watch.phase("committing", limit_s=0.75):
    threading.Event().wait(60)
"""

MOVING = """
import signal, time
import common.watchdog
common.watchdog.TICK_S, common.watchdog.MAX_TICK_S = 0.05, 0.2
watch = common.watchdog.Watchdog().watch("the loop", limit_s=2)
is_told = False
signal.signal(signal.SIGUSR1, lambda *_: globals().update(is_told=True))
print("moving", flush=True)
while not is_told:
    watch.beat()
    time.sleep(0.02)
"""

NOTIFYING = """
import os, sys
from common.watchdog import Watchdog
assert "NOTIFY_SOCKET" in os.environ
watchdog = Watchdog()
assert "NOTIFY_SOCKET" not in os.environ, "a child process would speak for this one"
watchdog.watch("the loop", limit_s=60).enter("serving", limit_s=60)
sys.stdin.readline()
watchdog.ready()
sys.stdin.readline()
watchdog.stopping()
sys.stdin.readline()
watchdog.close()
"""


def start(script: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env={**os.environ, **environment})


def test_an_overdue_watch_ends_the_process_with_its_stacks_and_one_line() -> None:
    with start(STUCK) as process:
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said.splitlines()[-1].startswith('the learner\'s inbox has not moved for 1 s in phase "committing"')
    assert said.splitlines()[-1].endswith("expected at most 1 s: ending, so that a supervisor starts it again")
    assert 'File "<string>", line 7' in said


def test_a_process_that_was_stopped_and_continued_is_not_punished() -> None:
    with start(MOVING) as process:
        assert process.stdout
        assert process.stdout.readline() == "moving\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(3)  # longer than its limit
        process.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGUSR1)
        _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (0, "")


def test_a_supervisor_hears_that_it_is_ready_alive_and_what_it_does() -> None:
    signs = Signs()
    with start(NOTIFYING, **{NOTIFY_SOCKET: signs.address}) as process:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
        deadline = time.monotonic() + 30
        while not (signs.hear() and signs.is_ready and signs.status) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (signs.is_ready, signs.status) == (True, "serving")
        _, said = process.communicate("go\ngo\n", timeout=30)
    assert (process.returncode, said) == (0, "")
    signs.forget()
    assert (signs.is_ready, signs.status, signs.hear()) == (False, "", False)
    signs.close()


def test_a_supervisor_is_asked_for_time_while_a_component_starts_and_while_it_stops(tmp_path: Path) -> None:
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(tmp_path / "notify"))
    manager.settimeout(30)

    def hear(count: int) -> list[str]:
        return [manager.recv(4096).decode() for _ in range(count)]

    alive, plea = "WATCHDOG=1\nSTATUS=serving", "\nEXTEND_TIMEOUT_USEC=60000000"
    with start(NOTIFYING, **{NOTIFY_SOCKET: str(tmp_path / "notify")}) as process:
        assert process.stdin
        assert hear(1) == [alive + plea]
        for asked, answer in (("ready", ["READY=1", alive]), ("stopping", ["STOPPING=1", alive + plea])):
            process.stdin.write(f"{asked}\n")
            process.stdin.flush()
            heard = hear(1)
            while heard[-1] != answer[0]:
                heard += hear(1)
            assert hear(2) == [answer[1]] * 2
        process.communicate("go\n", timeout=30)
    manager.settimeout(0.1)
    left: list[str] = []
    with suppress(TimeoutError):
        while True:
            left += hear(1)
    assert "STOPPING=1" not in left
    manager.close()
