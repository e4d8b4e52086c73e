"""One group of random tokens, made alike for every side of a comparison."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

VOCABULARY = 49152
CLIP = 0.2
BEHAVIOR_LOGPROB = -10.8
"""About what the untrained policy gives to a random token, so that some ratios are clipped and some are not."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one group, in tokens."""

    prompt: int
    answer: int
    answers: int = 8

    @property
    def num_tokens(self) -> int:
        """Prompt once, answers each."""
        return self.prompt + self.answers * self.answer

    def __str__(self) -> str:
        return f"prompt {self.prompt}, answers {self.answer}"


@dataclass(frozen=True, eq=False)
class Group:
    """What both sides train on."""

    prompt: NDArray[np.int32]
    """[P]"""
    answers: NDArray[np.int32]
    """[K, A]"""
    behavior_logprobs: NDArray[np.float32]
    """[K, A]"""
    advantages: NDArray[np.float32]
    """[K]"""


def make_group(shape: Shape) -> Group:
    numbers = np.random.default_rng(11)
    size = (shape.answers, shape.answer)
    return Group(
        numbers.integers(0, VOCABULARY, shape.prompt).astype(np.int32),
        numbers.integers(0, VOCABULARY, size).astype(np.int32),
        (BEHAVIOR_LOGPROB + numbers.normal(size=size)).astype(np.float32),
        numbers.normal(size=shape.answers).astype(np.float32),
    )
