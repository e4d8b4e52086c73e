"""Group-relative advantages: each answer's reward against the other answers to the same prompt."""

from typing import Literal

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, scale: Literal["std", "none"] = "std", eps: float = 1e-6) -> Tensor:
    """
    A_k = (R_k − mean R) / (std R + eps) with the unbiased std; `none` leaves out the division. [K] -> [K]

    GRPO (arXiv 2402.03300), as CHORD (arXiv 2508.11408) uses it.
    A group whose rewards are all equal carries no signal: its advantages are exactly 0.
    """
    if rewards.ndim != 1 or len(rewards) < 2:
        raise ValueError(f"rewards: got shape {list(rewards.shape)}, expected [K] with K >= 2")
    is_finite = rewards.isfinite()
    if not is_finite.all():
        raise ValueError(f"rewards: got {float(rewards[~is_finite][0])}, expected finite numbers")
    if scale not in ("std", "none"):
        raise ValueError(f"scale: got {scale!r}, expected std or none")

    # Not std < eps: the rounded mean of equal float32 rewards may differ from each of them.
    if rewards.max() == rewards.min():
        return torch.zeros_like(rewards)
    centred = rewards - rewards.mean()
    return centred if scale == "none" else centred / (rewards.std(correction=1) + eps)
