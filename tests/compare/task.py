"""The task of the comparison: sums of three numbers, which the expert works out; and what nobody trains on.

The untrained model, which has 135 million parameters, answers in sentences whatever it is asked for. So all questions
are reasoning_gym's own, but the environment `math` reads the answers: "The answer is 7." is one.
"""

from dataclasses import dataclass, field
from typing import Any

FORM = 'Answer in the form "The answer is {}."'


@dataclass(frozen=True)
class Family:
    """A family of reasoning_gym and how it is asked."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict[str, Any])
    """The family's own."""
    example: str = "7"
    """Stands for an answer in the system prompt."""
    max_tokens: int = 16

    @property
    def system_prompt(self) -> str:
        return FORM.format(self.example)


TRAINED = Family("chain_sum", {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 1}, max_tokens=40)
UNTRAINED = (
    Family("products", {"min_digits": 1, "max_digits": 1}),
    Family("gcd", {"max_value": 20}),
    Family("syllogism", example="Yes"),
    Family("isomorphic_strings", example="True"),
)
"""Families of other kinds, by which it is measured what training costs elsewhere."""
TEMPERATURE = 0.6
"""Of rollouts and tests. At 1 one answer in a hundred of the untrained model's is right: hardly a signal."""
