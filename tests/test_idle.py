"""Idle time: what an actor counts, how the learner adds it up, and how it is told."""

from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import pytest

from actors.idle_clock import IdleClock
from common.local.progress import describe_idle, describe_summary
from common.version import Version
from common.wire.messages import ActorState, Hello, Role, WorkRequest
from learner.peers import Labour, Peer, Peers

VERSION = Version(run_id="run", incarnation=1, step=0, hash="0" * 64)


class HandClock:
    """Goes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    made = HandClock()
    monkeypatch.setattr("learner.peers.time", SimpleNamespace(monotonic=made))
    return made


def join(peers: Peers, name: str, *, session: str = "s", role: Role = Role.ACTOR) -> Peer:
    hello = Hello(peer_id=name, session=session, role=role, engine="simulated", config_hash="agreed")
    peers.join(hello, cast(Any, None))
    peer = peers.get(hello.routing_id)
    assert peer
    return peer


def report(*, idle_s: float = 0.0, tokens: int = 0, serving: Version | None = VERSION) -> WorkRequest:
    return WorkRequest(
        state=ActorState.SERVING, capacity=0, serving=serving, sampled_tokens=tokens, idle_s=idle_s
    )  # fmt: skip


def test_the_idle_clock_runs_while_nothing_is_under_way_and_only_after_the_first_weights() -> None:
    clock = HandClock()
    idle = IdleClock(clock)
    clock.pass_s(10)
    assert idle.idle_s == 0
    idle.start()
    clock.pass_s(3)
    assert idle.idle_s == 3
    with idle.busy():
        clock.pass_s(5)
        with idle.busy():
            clock.pass_s(5)
        clock.pass_s(5)
        idle.start()
    assert idle.idle_s == 3
    clock.pass_s(2)
    assert idle.idle_s == 5


def test_the_idle_clock_goes_on_after_a_group_that_failed() -> None:
    clock = HandClock()
    idle = IdleClock(clock)
    idle.start()
    with suppress(RuntimeError), idle.busy():
        clock.pass_s(5)
        raise RuntimeError("out of pages")
    clock.pass_s(1)
    assert idle.idle_s == 1


def test_idle_time_is_a_share_of_the_time_in_which_actors_served(clock: HandClock) -> None:
    peers = Peers()
    early, late = join(peers, "early"), join(peers, "late")
    peers.heard(early, report())
    peers.heard(late, report(serving=None))
    clock.pass_s(10)
    peers.heard(early, report(idle_s=5.0, tokens=70))
    peers.heard(late, report(serving=None))
    assert peers.labour == Labour(70, 10.0, 5.0)
    assert peers.labour.idle_frac == 0.5


def test_what_actors_did_before_the_learner_came_is_not_the_learners(clock: HandClock) -> None:
    peers = Peers()
    peer = join(peers, "a")
    peers.heard(peer, report(idle_s=100.0, tokens=500))
    clock.pass_s(4)
    peers.heard(peer, report(idle_s=101.0, tokens=520))
    assert peers.labour == Labour(20, 4.0, 1.0)


def test_a_first_report_that_was_sent_again_tells_of_no_more_idle_time_than_has_passed(clock: HandClock) -> None:
    peers = Peers()
    peer = join(peers, "a")
    peers.heard(peer, report(idle_s=3.0))  # made 7 s ago, while the learner was down
    clock.pass_s(1)
    peers.heard(peer, report(idle_s=11.0))
    assert peers.labour == Labour(0, 1.0, 1.0)
    clock.pass_s(3)
    peers.heard(peer, report(idle_s=11.5))
    assert peers.labour == Labour(0, 4.0, 1.5)


def test_actors_that_leave_or_start_again_take_nothing_away(clock: HandClock) -> None:
    peers = Peers()
    for session in ("first", "second"):
        peer = join(peers, "a", session=session)
        peers.heard(peer, report())
        clock.pass_s(10)
        peers.heard(peer, report(idle_s=2.0, tokens=30))
    before = peers.labour
    assert before == Labour(60, 20.0, 4.0)
    peers.leave(peer)
    assert peers.labour == before
    assert peers.labour.since(before) == Labour()
    assert Labour().since(before) == Labour()


def test_evaluators_are_no_actors(clock: HandClock) -> None:
    peers = Peers()
    peer = join(peers, "evaluator", role=Role.EVALUATOR)
    peers.heard(peer, report())
    clock.pass_s(10)
    peers.heard(peer, report(idle_s=10.0))
    assert peers.labour == Labour()
    assert peers.labour.idle_frac == 0


def test_both_shares_are_told_of_a_step_and_of_a_run() -> None:
    assert describe_idle(learner=0.104, actors=0.87) == "idle: learner 10% actors 87%"
    assert describe_idle(learner=0.0, actors=None) == "idle: learner 0%"
    summary = {
        "eval_tasks": {}, "groups_by_actor": {"a": 8}, "steps": 4, "wall_s": 60.0, "lost": 0, "duplicates": 0,
        "trajectories_trained": 64, "max_staleness_trained": 1, "learner_wait_frac": 0.02, "actor_idle_frac": 0.5,
    }  # fmt: skip
    assert "at most 1 steps old (idle: learner 2% actors 50%); lost 0" in describe_summary(summary)
