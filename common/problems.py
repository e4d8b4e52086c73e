"""Procedural problems of reasoning_gym, split into training and held-out ones by the text of the question.

A question's split is a hash of its text, so that held-out problems share no question with training prompts or expert
rows, whichever seeds drew them, with nothing to be kept in step between machines.
"""

import hashlib
import os
import random
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, cast

from common.chat import ChatMessage
from common.errors import ConfigError

Split = Literal["train", "held_out"]

TAG = "<answer>"
"""Where a final answer begins, if an answer has it; it ends with </answer>."""
HELD_OUT_BUCKETS = 4
"""Of 16 equally large buckets of questions, those that are held out."""
_WINDOW = 512
"""Items drawn at most to find one of the wanted split: all of the other kind has probability (3/4)^512 or less."""
_NUM_ITEMS = {
    "acre": _WINDOW,
    "gsm_symbolic": 512 * _WINDOW,
    "list_functions": 512 * _WINDOW,
    "word_ladder": 39 * _WINDOW,
}
"""Items of one dataset of families that lay all of them out at once, or refuse more; others have any number."""


_HASHED = {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
"""Families that go through sets of texts, in an order that is Python's own in each process."""


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


def first_item(seed: int) -> int:
    """Where the problems of a run's seed begin: reasoning_gym seeds item n with seed + n, so seeds are spread far."""
    return seed * 2_654_435_761 % 2**31  # Knuth's multiplicative hash; some families take no seed from 2^32 on


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
        """`seed` is that of the first item (see `first_item`), `parameters` are the family's own.

        Raises ConfigError where reasoning_gym refuses them, or where another process would have other problems.
        `num_train_problems` makes the training split a finite one, gone through again and again.
        """
        self.family = family
        self._num_train_problems = num_train_problems
        self._system = (ChatMessage(role="system", content=system_prompt),) if system_prompt else ()
        self._seed = seed
        self._parameters = parameters
        self._num_items = _NUM_ITEMS.get(family, 2**31 - 1)
        self._first, self._dataset = 0, self._beginning_at(0)

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

    def _beginning_at(self, position: int) -> Any:
        """The dataset whose first item is number `position`, as reasoning_gym seeds item n with seed + n."""
        import reasoning_gym  # pyright: ignore[reportMissingTypeStubs]
        from reasoning_gym.factory import DATASETS  # pyright: ignore

        families = sorted(cast("dict[str, Any]", DATASETS))
        if self.family not in families:
            close = get_close_matches(self.family, families, n=1) or families[:1]
            expected = f"one of reasoning_gym's {len(families)}, such as {close[0]}"
            raise ConfigError([f"environment.options: {self.family}: got no family, expected {expected}"])
        if self.family in _HASHED and os.environ.get("PYTHONHASHSEED", "random") == "random":
            got = f"environment.options: {self.family}: got no PYTHONHASHSEED in the environment"
            raise ConfigError([f"{got}, expected one for all processes, such as 0: its problems follow from it"])
        try:
            return cast(Any, reasoning_gym).create_dataset(
                self.family, size=self._num_items, seed=self._seed + position, **self._parameters
            )
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError([f"environment.options: {self.family}: {error}"]) from error

    def _at(self, position: int) -> Problem:
        offset = position % self._num_items
        if position - offset != self._first:
            self._first, self._dataset = position - offset, self._beginning_at(position - offset)
        with _seeded(f"{self._seed}/{position}"):
            entry = self._dataset[offset]
        question, answer = str(entry["question"]), str(entry["answer"])
        metadata = entry["metadata"]
        solution = str(metadata.get("answer_cot") or metadata.get("solution") or answer)
        messages = (*self._system, ChatMessage(role="user", content=question))
        return Problem(messages, question, answer, solution, entry)


@contextmanager
def _seeded(seed: str) -> Generator[None]:
    """For families that draw from Python's own generator too, which is as it was afterwards."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def final_answer(text: str) -> str:
    """What an answer states at its end: inside <answer>…</answer>, else after ####, else all of it."""
    if TAG in text:
        return text.rpartition(TAG)[2].partition("</answer>")[0].strip()
    return text.rpartition("####")[2].strip()
