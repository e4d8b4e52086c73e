"""The environment `reasoning_gym`: any of its families, scored by the family's own scorer."""

import logging
from collections.abc import Sequence
from typing import Any

from actors.environment import Judgement, SingleTurn
from common.chat import ChatMessage
from common.problems import TAG, Problem, ReasoningProblems, Split, final_answer, first_item

log = logging.getLogger(__name__)


class ReasoningGym(SingleTurn[Problem]):
    """Options: `family`, `system_prompt`, and the family's own parameters.

    Where the system prompt asks for <answer>…</answer>, a wrong answer without it counts as one that cannot be read.
    """

    def __init__(self, *, seed: int, **options: Any) -> None:
        self._asks_for_tag = TAG in str(options.get("system_prompt", ""))
        self._problems = ReasoningProblems(seed=first_item(seed), **options)
        self._held_out = self._problems.distinct("held_out")
        self._seen: list[Problem] = []

    def task(self, split: Split, index: int) -> tuple[Problem, Sequence[ChatMessage]]:
        problem = self._problems.problem("train", index) if split == "train" else self._held_out_problem(index)
        return problem, problem.messages

    def score(self, task: Problem, text: str) -> float:
        return self.judge(task, text, is_truncated=False).reward

    def judge(self, task: Problem, text: str, *, is_truncated: bool) -> Judgement:
        try:
            reward = self._problems.score(task, text)
        except Exception as error:  # some families' scorers fall over what is not in the form of an answer
            log.debug("%s: an answer that its scorer cannot read: %s", self._problems.family, error)
            return Judgement(0.0, is_parsed=False)
        has_form = TAG in text or not self._asks_for_tag or reward == self.full_reward
        return Judgement(reward) if has_form and final_answer(text) else Judgement(0.0, is_parsed=False)

    def _held_out_problem(self, index: int) -> Problem:
        while len(self._seen) <= index:
            problem = next(self._held_out, None)
            if problem is None:
                raise IndexError(f"{self._problems.family} has only {len(self._seen)} different held-out questions")
            self._seen.append(problem)
        return self._seen[index]
