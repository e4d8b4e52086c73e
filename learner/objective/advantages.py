"""Group-relative advantages: each answer's reward against the other answers to the same prompt."""

from typing import Literal

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, scale: Literal["std", "none"] = "std", eps: float = 1e-6) -> Tensor:
    """
    A_k = (R_k − mean R) / (std R + eps) with the unbiased std; `none` leaves out the division. [K] -> [K]

    GRPO (arXiv 2402.03300), as CHORD (arXiv 2508.11408) uses it.
    A group whose rewards are all equal carries no signal: its advantages are exactly 0. Computed in float64, as rewards
    may lie close together and far from 0; returned in the rewards' dtype, or in float32 where they are whole numbers.

    Raises ValueError for fewer than two rewards, and for one that is not finite.
    """
    if rewards.ndim != 1 or len(rewards) < 2:
        raise ValueError(f"rewards: got shape {list(rewards.shape)}, expected [K] with K >= 2")
    is_finite = rewards.isfinite()
    if not is_finite.all():
        raise ValueError(f"rewards: got {float(rewards[~is_finite][0])}, expected finite numbers")
    if scale not in ("std", "none"):
        raise ValueError(f"scale: got {scale!r}, expected std or none")

    dtype = rewards.dtype if rewards.is_floating_point() else torch.float32
    exact = rewards.double()
    # Not std < eps: the rounded mean of equal rewards may differ from each of them.
    if exact.max() == exact.min():
        return torch.zeros_like(exact, dtype=dtype)
    centred = exact - exact.mean()
    advantages = centred if scale == "none" else centred / (exact.std(correction=1) + eps)
    return advantages.to(dtype)
