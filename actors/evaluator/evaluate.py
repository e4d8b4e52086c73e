"""Scores one version on held-out problems."""

import asyncio
import time
from dataclasses import dataclass

from actors.engine import SamplingParameters
from actors.start import Parts
from common.errors import OperatorError


@dataclass(frozen=True)
class Score:
    """The outcome of one evaluation."""

    num_problems: int
    num_correct: int
    mean_score: float
    mean_answer_tokens: float
    wall_s: float

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_problems


async def evaluate(
    parts: Parts, sampling: SamplingParameters, *, num_problems: int, max_concurrency: int,
) -> Score:  # fmt: skip
    """One answer to each of the first `num_problems` held-out problems. Raises OperatorError where there are fewer."""
    started = time.monotonic()
    room = asyncio.Semaphore(max_concurrency)
    try:
        episodes = [parts.environment.episode("held_out", index) for index in range(num_problems)]
    except IndexError as error:
        raise OperatorError(f"eval.num_problems: got {num_problems}, expected fewer: {error}") from error

    async def run(index: int) -> tuple[float, int]:
        async with room:
            trajectory = (await parts.rollout.episode(episodes[index], sampling)).trajectory
        return trajectory.reward, trajectory.num_answer_tokens

    try:
        async with asyncio.TaskGroup() as running:
            tasks = [running.create_task(run(index)) for index in range(num_problems)]
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    rewards, lengths = zip(*(task.result() for task in tasks), strict=True)
    return Score(
        num_problems=num_problems,
        num_correct=sum(reward >= parts.environment.full_reward for reward in rewards),
        mean_score=sum(rewards) / num_problems,
        mean_answer_tokens=sum(lengths) / num_problems,
        wall_s=time.monotonic() - started,
    )
