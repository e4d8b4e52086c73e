"""Scores answers that were sampled elsewhere, or saved by `--samples`: no model and no engine."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from actors.environment import Turn, answer_in_time, begin_in_time
from actors.evaluator.evaluate import places_of
from actors.evaluator.samples import Place, Sample, SavedAnswer, read_answers
from actors.evaluator.scores import score_task
from actors.evaluator.tasks import EvaluationTask
from common.errors import OperatorError
from common.wire.messages import TaskScore

MAX_SAMPLES = 4096
"""Answers to one problem, as many as eval.samples_per_problem may be."""


class SavedAnswers:
    """A file of answers, found to be complete for the tasks."""

    def __init__(self, path: Path, tasks: Sequence[EvaluationTask]) -> None:
        """Raises OperatorError where a line names what is not there, or an answer is missing."""
        self._path = path
        self._tasks = tasks
        self._answers = read_answers(path)
        _check_places(self._answers, tasks)
        self._sizes = {task.name: self._num_samples(task) for task in tasks}

    async def score(
        self, *, seed: int, limit_s: float, keep: Callable[[Sequence[Sample]], None] = lambda _: None
    ) -> tuple[TaskScore, ...]:
        """The score of each task; `limit_s`: longest score of one answer. `keep` gets each task's samples."""
        scores: list[TaskScore] = []
        for task in self._tasks:
            places = places_of(task, self._sizes[task.name])
            samples = [await self._judge(task, problem, number, limit_s) for problem, number in places]
            keep(samples)
            scores.append(score_task(samples, wall_s=0.0, seed=seed))
        return tuple(scores)

    def _num_samples(self, task: EvaluationTask) -> int:
        """k of the task; every problem must have that many."""
        k = 1 + max((number for name, _, number in self._answers if name == task.name), default=0)
        for problem, number in places_of(task, k):
            if (task.name, problem, number) not in self._answers:
                raise OperatorError(
                    f"{self._path}: got no answer to {task.name} problem {problem} sample {number}, expected "
                    f"{k} to each of its {len(task.problems)} problems"
                )
        return k

    async def _judge(self, task: EvaluationTask, problem: int, number: int, limit_s: float) -> Sample:
        saved = self._answers[task.name, problem, number]
        episode = task.environment.episode("held_out", problem)
        opening = await begin_in_time(episode, limit_s=limit_s)
        turn = await answer_in_time(episode, saved.text, is_truncated=saved.is_truncated, limit_s=limit_s)
        _refuse_further_turns(turn, saved, task)
        return Sample(
            task=task.name,
            problem=problem,
            sample=number,
            category=episode.category,
            question=opening[-1].content,
            gold=task.golds.get(problem, ""),
            text=saved.text,
            reward=turn.reward,
            is_correct=turn.reward >= task.environment.full_reward,
            is_parsed=turn.is_parsed,
            is_truncated=saved.is_truncated,
            num_answer_tokens=saved.num_answer_tokens,
        )


def _check_places(answers: Mapping[Place, SavedAnswer], tasks: Sequence[EvaluationTask]) -> None:
    problems = {task.name: set(task.problems) for task in tasks}
    for (name, problem, number), saved in answers.items():
        if name not in problems:
            raise OperatorError(f'{saved.where}: task: got "{name}", expected {" or ".join(problems)}')
        if problem not in problems[name]:
            last, count = max(problems[name]), len(problems[name])
            among = f"0 to {last}" if count == last + 1 else f"one of the {count} drawn (eval.max_benchmark_problems)"
            raise OperatorError(f"{saved.where}: problem: got {problem} of {name}, expected {among}")
        if number >= MAX_SAMPLES:
            raise OperatorError(f"{saved.where}: sample: got {number}, expected less than {MAX_SAMPLES}")


def _refuse_further_turns(turn: Turn, saved: SavedAnswer, task: EvaluationTask) -> None:
    if turn.messages and not saved.is_truncated:
        raise OperatorError(f"{saved.where}: {task.name} goes on after this answer, expected a task of one answer")
