"""Rollouts: how long an environment may take over an answer, and what each turn of an episode is sampled with."""

import asyncio
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from actors.engine import Answer, FinishReason, Pressure, SamplingParameters
from actors.environment import Episode, SingleTurn, Turn, answer_in_time
from actors.guard import EngineGuard
from actors.rollout import Rollout
from common.chat import Chat, ChatMessage
from common.config.schema import Actor
from common.errors import WaitTimeout
from common.problems import Split
from common.version import Version
from common.wait import wait_for
from common.weights.snapshot import Snapshot
from common.wire.messages import Lease

NUM_TURNS = 3
LIMITS = Actor(max_model_tokens=256)  # pyright: ignore[reportCallIssue]


class Sleepy(SingleTurn[int]):
    """Sleeps over each answer."""

    def __init__(self, score_s: float) -> None:
        self._score_s = score_s

    def task(self, split: Split, index: int) -> tuple[int, Sequence[ChatMessage]]:
        return index, [ChatMessage(role="user", content=f"Say {index}")]

    def score(self, task: int, text: str) -> float:
        time.sleep(self._score_s)
        return float(text == str(task))


class Stuck(Sleepy):
    """Comes back from the answer "stuck" when it is told to."""

    def __init__(self) -> None:
        super().__init__(score_s=0.0)
        self.is_free = threading.Event()

    def score(self, task: int, text: str) -> float:
        if text == "stuck":
            self.is_free.wait(60)
        return super().score(task, text)


def answers_to(environment: SingleTurn[int], texts: Sequence[str], *, limit_s: float) -> list["asyncio.Task[Turn]"]:
    """One episode's answer each, all of them given at once."""
    return [
        asyncio.create_task(
            answer_in_time(environment.episode("train", index), text, is_truncated=False, limit_s=limit_s)
        )
        for index, text in enumerate(texts)
    ]


def test_answers_in_line_for_the_scorer_are_all_scored_though_the_line_outlasts_the_limit() -> None:
    score_s, limit_s, count = 0.25, 4.0, 24

    async def run() -> list[Turn]:
        async with asyncio.timeout(120):
            return await asyncio.gather(*answers_to(Sleepy(score_s), list(map(str, range(count))), limit_s=limit_s))

    began = time.monotonic()
    assert asyncio.run(run()) == [Turn(1.0)] * count
    assert time.monotonic() - began > limit_s + 1


def test_an_answer_that_the_scorer_is_stuck_in_is_given_up_and_costs_those_behind_it_nothing() -> None:
    environment = Stuck()

    async def run() -> list[Turn]:
        async with asyncio.timeout(120):
            stuck, *others = answers_to(environment, ["stuck", "1", "2"], limit_s=4.0)
            with pytest.raises(
                WaitTimeout, match=r"waited \d s for a score from the environment, expected it within 4 s"
            ):
                await stuck
            environment.is_free.set()
            return await asyncio.gather(*others)

    try:
        assert asyncio.run(run()) == [Turn(1.0)] * 2
    finally:
        environment.is_free.set()


def test_answers_behind_one_that_the_scorer_never_leaves_are_given_up_together() -> None:
    environment = Stuck()
    limit_s, count = 0.2, 64

    async def run() -> list[Turn | BaseException]:
        async with asyncio.timeout(30):
            answers = answers_to(environment, ["stuck"] * count, limit_s=limit_s)
            return await asyncio.gather(*answers, return_exceptions=True)

    try:
        assert [type(outcome) for outcome in asyncio.run(run())] == [WaitTimeout] * count
    finally:
        environment.is_free.set()


def test_a_wait_whose_limit_counts_from_a_moment_to_come_ends_in_time_when_that_moment_turns_out_to_be_past() -> None:
    moments = iter([time.monotonic() + 600])

    async def run() -> None:
        async with asyncio.timeout(60):
            never = asyncio.Event().wait()
            await wait_for(never, "a score", whom="nobody", limit_s=0.1, since=lambda: next(moments, 0.0))

    with pytest.raises(WaitTimeout, match="for a score from nobody"):
        asyncio.run(run())


def test_the_limit_of_an_answer_counts_from_its_own_judging_and_in_line_from_the_end_of_the_limit_before_it() -> None:
    environment = Sleepy(0.0)
    episode, behind = (environment.episode("train", index) for index in range(2))

    async def run() -> tuple[float, float]:
        began = time.monotonic()
        await episode.answer("0", is_truncated=False)
        return began, time.monotonic()

    began, ended = asyncio.run(run())
    assert began <= episode.counted_from(60.0) <= ended  # pyright: ignore
    assert began + 60 <= behind.counted_from(60.0) <= ended + 60  # pyright: ignore


class Talk:
    """An environment that asks again until it has had three answers."""

    full_reward = 1.0

    def episode(self, split: Split, index: int) -> Episode:
        return TalkEpisode()


class TalkEpisode:
    category = ""

    def __init__(self) -> None:
        self._num_answers = 0

    async def begin(self) -> Sequence[ChatMessage]:
        return [ChatMessage(role="user", content="Say something.")]

    async def answer(self, text: str, *, is_truncated: bool) -> Turn:
        self._num_answers += 1
        again = (ChatMessage(role="user", content="And now?"),)
        return Turn(0.0, again if self._num_answers < NUM_TURNS else ())


class NotingEngine:
    """Says one token, and notes the seed that it was asked with."""

    name = "noting"
    version: Version | None = None
    num_running = 0
    pressure = Pressure()

    def __init__(self) -> None:
        self.seeds: list[int | None] = []

    async def start(self) -> None: ...

    async def load(self, snapshot: Snapshot, *, in_flight: bool = True) -> None: ...

    async def sample(self, prompt: Sequence[int], sampling: SamplingParameters) -> Answer:
        self.seeds.append(sampling.seed)
        return Answer(np.ones(1, np.int32), np.zeros(1, np.float32), np.zeros(1, np.int32), FinishReason.STOP)

    async def probe(self) -> None: ...

    async def close(self) -> None: ...


def rollout_with(engine: NotingEngine, model: Path) -> Rollout:
    return Rollout(EngineGuard(engine, LIMITS, CollectorRegistry()), Talk(), Chat(model), LIMITS)


def seeds_of_a_group(model: Path) -> list[int | None]:
    engine = NotingEngine()
    lease = Lease(lease_id="a", prompt_index=0, group_size=4, temperature=1.0, max_tokens=8, seed=2**53 - 4)
    asyncio.run(rollout_with(engine, model).group(lease))
    return engine.seeds


def test_no_two_turns_of_a_group_have_a_seed_in_common_and_a_repetition_has_the_same_ones(tiny_model: Path) -> None:
    seeds = seeds_of_a_group(tiny_model)
    assert len(set(seeds)) == len(seeds) == 4 * NUM_TURNS
    assert set(seeds) >= {2**53 - 4 + k for k in range(4)}, "expected the lease's own seeds for first turns"
    assert sorted(map(str, seeds_of_a_group(tiny_model))) == sorted(map(str, seeds))


def test_without_a_seed_no_turn_has_one(tiny_model: Path) -> None:
    engine = NotingEngine()
    rollout = rollout_with(engine, tiny_model)
    asyncio.run(rollout.episode(TalkEpisode(), SamplingParameters(temperature=1.0, max_tokens=8)))
    assert engine.seeds == [None] * NUM_TURNS
