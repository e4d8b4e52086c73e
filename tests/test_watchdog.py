"""The watchdog, in processes of its own: what it ends, what it forgives, and what a supervisor hears."""

import os
import signal
import subprocess
import sys
import time

from common.local.signs import Signs
from common.watchdog import NOTIFY_SOCKET

STUCK = """
import threading
from common.watchdog import Watchdog
watchdog = Watchdog()
watch = watchdog.watch("the learner's inbox", limit_s=600)
with watch.phase("committing", limit_s=1):
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
watchdog.ready()
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
        deadline = time.monotonic() + 30
        while not (signs.hear() and signs.status) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert (signs.is_ready, signs.status) == (True, "serving")
        _, said = process.communicate("go\n", timeout=30)
    assert (process.returncode, said) == (0, "")
    signs.forget()
    assert (signs.is_ready, signs.status, signs.hear()) == (False, "", False)
    signs.close()
