"""Scores one version on every task: k answers to each problem, so many at a time."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from actors.engine import SamplingParameters, seed_from
from actors.evaluator.progress import Progress
from actors.evaluator.samples import Sample
from actors.evaluator.scores import score_task
from actors.evaluator.tasks import EvaluationTask
from actors.rollout import Attempt, PromptTooLong, Rollout
from common.config.schema import Config
from common.errors import OperatorError
from common.wire.messages import TaskScore

TELL_S = 1.0
"""Between two reports of how far it has come, at least."""


@dataclass(frozen=True)
class Plan:
    """What one evaluation does, the same for every version."""

    tasks: Sequence[EvaluationTask]
    sampling: SamplingParameters
    samples_per_problem: int
    max_concurrency: int
    """Answers in flight."""
    seed: int


def plan_of(config: Config, tasks: Sequence[EvaluationTask]) -> Plan:
    sampling = SamplingParameters(
        temperature=config.eval.temperature,
        max_tokens=config.eval.max_tokens or config.sampling.max_tokens,
        top_p=config.eval.top_p,
        top_k=config.eval.top_k,
    )
    return Plan(tasks, sampling, config.eval.samples_per_problem, config.eval.max_concurrency, config.run.seed)


class Evaluation:
    """One run through a plan."""

    def __init__(
        self,
        plan: Plan,
        rollout: Rollout,
        *,
        show: Callable[[Progress], None] = lambda _: None,
        keep: Callable[[Sequence[Sample]], None] = lambda _: None,
    ) -> None:
        """`show` is called after each answer and each second, `keep` with the samples of each task once it is done."""
        self._plan = plan
        self._rollout = rollout
        self._show = show
        self._keep = keep

    async def run(self) -> tuple[TaskScore, ...]:
        """The score of each task. Raises SamplingFailed where the engine gives no answer, WaitTimeout where the
        environment gives none, OperatorError where a prompt does not fit, and what the environment raises."""
        return tuple([await self._score(task) for task in self._plan.tasks])

    async def _score(self, task: EvaluationTask) -> TaskScore:
        began = time.monotonic()
        samples = await self._sample(task)
        self._keep(samples)
        return score_task(samples, wall_s=time.monotonic() - began, seed=self._plan.seed)

    async def _sample(self, task: EvaluationTask) -> list[Sample]:
        """All answers, by problem; as many loops as answers may be in flight take one after the other."""
        k = self._plan.samples_per_problem
        places = places_of(task, k)
        num_answers = len(task.problems) * k
        samples: list[Sample] = []

        async def work() -> None:
            for problem, number in places:
                samples.append(await self._answer(task, problem, number))
                self._show(Progress(task.name, len(samples), num_answers))

        async def tell() -> None:
            """However long the next answer takes."""
            while True:
                await asyncio.sleep(TELL_S)
                self._show(Progress(task.name, len(samples), num_answers))

        telling = asyncio.create_task(tell(), name="progress")
        try:
            async with asyncio.TaskGroup() as running:
                for _ in range(min(self._plan.max_concurrency, num_answers)):
                    running.create_task(work())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            telling.cancel()
        return sorted(samples, key=lambda sample: (sample.problem, sample.sample))

    async def _answer(self, task: EvaluationTask, problem: int, number: int) -> Sample:
        episode = task.environment.episode("held_out", problem)
        sampling = replace(self._plan.sampling, seed=seed_of(self._plan.seed, task.name, problem, number))
        try:
            attempt = await self._rollout.episode(episode, sampling)
        except PromptTooLong as error:
            raise OperatorError(f"{task.name}: problem {problem}: {error}") from error
        return sample_of(task, problem, number, attempt, category=episode.category)


def sample_of(task: EvaluationTask, problem: int, number: int, attempt: Attempt, *, category: str) -> Sample:
    trajectory = attempt.trajectory
    return Sample(
        task=task.name,
        problem=problem,
        sample=number,
        category=category,
        question=attempt.question,
        gold=task.golds.get(problem, ""),
        text=attempt.text,
        reward=trajectory.reward,
        is_correct=trajectory.reward >= task.environment.full_reward,
        is_parsed=attempt.is_parsed,
        is_truncated=trajectory.is_truncated,
        num_answer_tokens=trajectory.num_answer_tokens,
    )


def seed_of(run_seed: int, task: str, problem: int, number: int) -> int:
    """Answers differ from each other, and a repetition gives the same ones, where the engine can."""
    return seed_from(run_seed, task, problem, number)


def places_of(task: EvaluationTask, k: int) -> Iterator[tuple[int, int]]:
    """Problem and sample of every answer."""
    for problem in task.problems:
        for number in range(k):
            yield problem, number
