"""Procedural problems of reasoning_gym, split into training and held-out ones by the text of the question.

A question's split is a hash of its text, so that held-out problems share no question with training prompts or expert
rows, whichever seeds drew them, with nothing to be kept in step between machines.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

from common.chat import ChatMessage
from common.errors import ConfigError

Split = Literal["train", "held_out"]

HELD_OUT_BUCKETS = 4
"""Of 16 equally large buckets of questions, those that are held out."""
_WINDOW = 512
"""Items drawn at most to find one of the wanted split: all of the other kind has probability (3/4)^512 or less."""


@dataclass(frozen=True)
class Problem:
    """One question with what is needed to score an answer."""

    messages: tuple[ChatMessage, ...]
    question: str
    answer: str
    """The family's own final answer."""
    solution: str
    """Its worked solution where the family gives one, else the answer."""
    entry: dict[str, Any]
    """reasoning_gym's item, which its scorer wants back."""


def split_of(question: str) -> Split:
    bucket = hashlib.sha256(question.encode()).digest()[0] % 16
    return "held_out" if bucket < HELD_OUT_BUCKETS else "train"


class ReasoningProblems:
    """An endless, seeded, random-access stream of problems of one family, for each split."""

    def __init__(
        self,
        *,
        family: str,
        system_prompt: str = "",
        num_train_problems: int | None = None,
        seed: int = 0,
        **parameters: Any,
    ) -> None:
        """`parameters` are the family's own. Raises ConfigError where reasoning_gym refuses them.

        `num_train_problems` makes the training split a finite one, gone through again and again.
        """
        import reasoning_gym  # pyright: ignore[reportMissingTypeStubs]

        self.family = family
        self._num_train_problems = num_train_problems
        self._system = (ChatMessage(role="system", content=system_prompt),) if system_prompt else ()
        try:
            self._dataset = cast(Any, reasoning_gym).create_dataset(family, size=2**31 - 1, seed=seed, **parameters)
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError([f"environment.options: {family}: {error}"]) from error

    def problem(self, split: Split, index: int) -> Problem:
        """Problem number `index` of `split`; the same one for the same seed, on any machine."""
        if split == "train" and self._num_train_problems:
            index %= self._num_train_problems
        for position in range(index * _WINDOW, (index + 1) * _WINDOW):
            problem = self._at(position)
            if split_of(problem.question) == split:
                return problem
        raise ConfigError(
            [f"environment.options: {self.family}: no {split} question among {_WINDOW}, expected more variety"]
        )

    def distinct(self, split: Split) -> Iterator[Problem]:
        """Problems of `split`, each question once; ends where new ones have become rare."""
        seen: set[str] = set()
        repeats = 0
        for index in range(2**31 // _WINDOW):
            problem = self.problem(split, index)
            if problem.question in seen:
                repeats += 1
                if repeats > 50 + 4 * len(seen):
                    return
                continue
            seen.add(problem.question)
            yield problem

    def score(self, problem: Problem, text: str) -> float:
        """reasoning_gym's own score in [0, 1] of the final answer in `text`; 1.0 is right."""
        return float(self._dataset.score_answer(answer=final_answer(text), entry=problem.entry))

    def _at(self, position: int) -> Problem:
        entry = self._dataset[position]
        question, answer = str(entry["question"]), str(entry["answer"])
        metadata = entry["metadata"]
        solution = str(metadata.get("answer_cot") or metadata.get("solution") or answer)
        messages = (*self._system, ChatMessage(role="user", content=question))
        return Problem(messages, question, answer, solution, entry)


def final_answer(text: str) -> str:
    """What an answer states at its end: inside <answer>…</answer>, else after ####, else all of it."""
    if "<answer>" in text:
        return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()
    return text.rpartition("####")[2].strip()
