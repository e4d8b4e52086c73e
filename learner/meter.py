"""The meter: what a step took of the learner's time, and what actors did meanwhile."""

from dataclasses import dataclass
from typing import Any

from learner.peers import Labour


@dataclass(frozen=True)
class Meter:
    """Read at the end of every step; what lies between two readings is a step, from one optimizer step to the next."""

    time: float
    labour: Labour
    """Of all actors."""

    def since(self, earlier: "Meter", *, waited_s: float) -> dict[str, Any]:
        """The fields of the step's record; `waited_s`: the learner's, for groups."""
        step_s, labour = max(self.time - earlier.time, 1e-9), self.labour.since(earlier.labour)
        return {
            "step_s": step_s,
            "learner_wait_frac": waited_s / step_s,
            "actor_tokens_per_s": labour.sampled_tokens / step_s,
            "actor_served_s": labour.served_s,
            "actor_idle_s": labour.idle_s,
            "actor_idle_frac": labour.idle_frac,
        }
