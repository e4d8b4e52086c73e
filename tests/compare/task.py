"""The task of the comparison: sums of three numbers worked out step by step, and families that nobody trains on."""

from dataclasses import dataclass, field
from typing import Any

SYSTEM_PROMPT = (
    "Work from left to right, one operation a line. Then write #### and the final answer.\n"
    "Example: 3 - 5 + 4 =\n3 - 5 = -2\n-2 + 4 = 2\n#### 2"
)


@dataclass(frozen=True)
class Family:
    """A family of reasoning_gym and how it is asked."""

    name: str
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    """The family's own parameters, and `system_prompt`."""
    max_tokens: int = 12

    def environment(self) -> dict[str, Any]:
        """As the options of the environment reasoning_gym."""
        return {"family": self.name, **self.options}


TRAINED = Family(
    "chain_sum",
    {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2, "system_prompt": SYSTEM_PROMPT},
    max_tokens=40,
)
UNTRAINED = (
    Family("syllogism"),
    Family("family_relationships"),
    Family("gcd"),
    Family("isomorphic_strings"),
)
"""Families of other kinds, by which it is measured what training costs elsewhere."""
