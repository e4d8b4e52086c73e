"""chord-local's supervisor, over real processes: what hangs or crashes is named and started again, within a budget."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from common.config.run import Run
from common.errors import ComponentFailure, OperatorError
from common.local.supervisor import Supervisor

ALIVE = """
import signal
from common.watchdog import Watchdog
watchdog = Watchdog()
watchdog.watch("the loop", limit_s=600).enter("serving version 3", limit_s=600)
watchdog.ready()
signal.pause()
"""
MUTE = "import signal; signal.pause()"
FAILED = "import sys; print('chord-learner: the disk is on fire\\nUserWarning: so hot', file=sys.stderr); sys.exit(1)"
REFUSED = "import sys; print('chord-actor: model.path: got nothing', file=sys.stderr); sys.exit(2)"


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Callable[..., Supervisor]]:
    """Makes a supervisor of one component, which runs `script`."""
    made: list[Supervisor] = []

    def supervise_(script: str, **run: float) -> Supervisor:
        supervisor = Supervisor(tmp_path, tmp_path, Run(**run), num_actors=0, has_evaluator=False)
        supervisor.learner.command = [sys.executable, "-c", script]
        made.append(supervisor)
        supervisor.start()
        return supervisor

    yield supervise_
    for supervisor in made:
        supervisor.stop(is_impatient=lambda: True)


def news_of(supervisor: Supervisor, is_enough: Callable[[list[str]], bool]) -> list[str]:
    """What it says until that is enough."""
    news: list[str] = []
    deadline = time.monotonic() + 30
    while not is_enough(news):
        assert time.monotonic() < deadline, news
        news += supervisor.watch()
        time.sleep(0.02)
    return news


def test_a_stopped_component_is_named_killed_and_started_again(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise(ALIVE, watchdog_s=2.0, first_sign_s=60.0)
    component = supervisor.learner
    news_of(supervisor, lambda _: component.signs.is_ready and component.signs.status != "")
    assert component.process
    stopped = component.process.pid
    os.kill(stopped, signal.SIGSTOP)
    news = news_of(supervisor, lambda news: len(news) == 2)
    silence = r"learner has given no sign of life for \d+ s \(its last: serving version 3\), expected one within 2 s"
    assert re.match(silence, news[0])
    assert news[1].startswith("learner ended with signal SIGKILL: starting it again")
    assert not psutil.pid_exists(stopped)
    news_of(supervisor, lambda _: component.signs.is_ready)
    assert component.process.pid != stopped
    assert supervisor.num_restarts == 1


def test_a_component_that_never_gives_a_sign_has_a_limit_of_its_own(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise(MUTE, watchdog_s=600.0, first_sign_s=1.0)
    (news, *_) = news_of(supervisor, lambda news: len(news) > 1)
    assert news.endswith("expected one within 1 s: killing it")


def test_crashes_are_answered_within_a_budget_and_say_why(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise(FAILED, max_crashes=2)
    news: list[str] = []
    with pytest.raises(ComponentFailure, match=r"crashed 3 times within 300 s, expected at most 2 \(run.max_crashes\)"):
        news_of(supervisor, lambda _: bool(news.extend(supervisor.watch())))
    assert len(news) == 2
    assert all(
        "ended with exit code 1: starting it again (chord-learner: the disk is on fire)" in line for line in news
    )
    assert supervisor.num_restarts == 2


def test_what_an_operator_must_mend_ends_the_run(supervise: Callable[..., Supervisor]) -> None:
    supervisor = supervise(REFUSED)
    with pytest.raises(OperatorError, match=r"model\.path: got nothing"):
        news_of(supervisor, lambda _: False)
