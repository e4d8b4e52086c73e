"""The task of the comparison: sums of two numbers of two digits, worked out by the expert; and what nobody trains on.

There are 16,200 such questions, all of a kind, so that what is trained on, validated and tested is drawn alike.
The untrained model, which has 135 million parameters, answers in sentences whatever it is asked for. So all questions
are reasoning_gym's own, without any word about a form, and the environment `math` reads the answers as they come: where
nothing else is stated, the last number is the answer.
"""

from dataclasses import dataclass, field
from typing import Any

READING = {"prompt_template": "{question}", "extraction": "last_number"}
"""How questions are asked and answers read, as options of the environment."""


@dataclass(frozen=True)
class Family:
    """A family of reasoning_gym."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    """The family's own."""
    max_tokens: int = 64


TRAINED = Family("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2}, max_tokens=40)
UNTRAINED = (
    Family("products", {"min_digits": 1, "max_digits": 1}),
    Family("gcd", {"max_value": 20}),
    Family("letter_counting", {"min_words": 2, "max_words": 4}),
)
"""Families of other kinds, of which the untrained model can do something, to measure what training costs elsewhere."""
TEMPERATURE = 0.6
"""Of rollouts and tests. At 1 the untrained model is too noisy to have much of a signal."""
