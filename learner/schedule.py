"""μ and the learning rate as functions of the optimizer step, so that a resumed run needs no state for them.

Both begin anew after `sft_steps`: until then μ is 1, then it is what the method says.
"""

import math
from typing import Literal

from common.config.schema import Config
from learner.objective.chord import adaptive_mu, mu_at


def mu_of(config: Config, step: int, *, mean_reward: float | None) -> float:
    """μ of optimizer step `step`, counted from 0; `mean_reward` is that of its trajectories, None without any."""
    algorithm, sft_steps = config.algorithm, config.sft_steps
    if step < sft_steps:
        return 1.0
    if algorithm.mu_target is not None:
        assert mean_reward is not None, "a step with an adaptive μ has groups"
        return adaptive_mu(mean_reward, target=algorithm.mu_target)
    return mu_at(
        step - sft_steps,
        peak=algorithm.mu_peak,
        valley=algorithm.mu_valley,
        warmup_steps=algorithm.mu_warmup_steps,
        decay_steps=algorithm.mu_decay_steps,
    )


def lr_of(config: Config, step: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0."""
    learner, sft_steps = config.learner, config.sft_steps
    is_sft = step < sft_steps
    return lr_at(
        step if is_sft else step - sft_steps,
        peak=learner.lr if is_sft or not sft_steps else learner.lr_after_sft or learner.lr,
        warmup_steps=learner.lr_warmup_steps,
        num_steps=min(sft_steps, learner.num_steps) if is_sft else learner.num_steps - sft_steps,
        schedule=learner.lr_schedule,
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
