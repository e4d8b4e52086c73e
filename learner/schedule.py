"""The learning rate as a function of the optimizer step, so that a resumed run needs no state for it."""

import math
from typing import Literal


def lr_at(
    step: int, *, peak: float, warmup_steps: int, num_steps: int, schedule: Literal["constant", "linear", "cosine"]
) -> float:
    """Learning rate of step `step`, counted from 0: linear warm-up to `peak`, then down to 0 at `num_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    if schedule == "linear":
        return peak * (1.0 - progress)
    if schedule == "cosine":
        return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak
