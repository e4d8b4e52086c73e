"""Rollouts: how long an environment may take over an answer."""

import asyncio
import threading
import time
from collections.abc import Sequence

import pytest

from actors.environment import SingleTurn, Turn, answer_in_time
from common.chat import ChatMessage
from common.errors import WaitTimeout
from common.problems import Split
from common.wait import wait_for


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
