"""μ and the learning rate as functions of the optimizer step, so that a resumed run needs no state for them."""

import math
from typing import Literal

from common.config.schema import Algorithm
from learner.objective.chord import mu_at


def mu_of(algorithm: Algorithm, step: int) -> float:
    """μ of optimizer step `step`, counted from 0, by the run's schedule."""
    return mu_at(
        step,
        peak=algorithm.mu_peak,
        valley=algorithm.mu_valley,
        warmup_steps=algorithm.mu_warmup_steps,
        decay_steps=algorithm.mu_decay_steps,
    )


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
