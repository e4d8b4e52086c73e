"""Importance correction: how policy tokens sampled by an older or a foreign policy are weighed.

π_b is the behaviour policy (the engine, at sampling), π_prox the learner before this update, π_θ the learner now.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 20.0
"""Log-ratios are clamped to ± this: e^20 is beyond every bound in use, and its square is still a float32."""

Kind = Literal["none", "ppo", "tis", "icepop", "decoupled", "cispo", "gspo"]


@dataclass(frozen=True)
class Correction:
    """Which correction, with which bounds; a kind ignores the bounds that its formula does not name."""

    kind: Kind = "tis"
    """
    The term to maximise per token, where r = π_θ/π_b, k = π_prox/π_b, u = π_θ/π_prox and sg stops the gradient:

    - `none`: A · log π_θ
    - `ppo`: min(r·A, clip(r)·A); arXiv 1707.06347, with π_b in the place of π_prox
    - `tis`: sg(min(k, cap)) · min(u·A, clip(u)·A); truncated importance sampling
    - `icepop`: sg(k where inside the band, else 0) · min(u·A, clip(u)·A)
    - `decoupled`: sg(k) · min(u·A, clip(u)·A); AReaL, arXiv 2505.24298
    - `cispo`: sg(min(r, 1 + clip_high)) · A · log π_θ; arXiv 2506.13585
    - `gspo`: min(s·A, clip(s)·A), s = exp(mean of log r over the row); arXiv 2507.18071, rows weighted by their tokens
    """
    clip_low: float = 0.2
    """clip() returns at least 1 − clip_low; within [0, 1]."""
    clip_high: float = 0.2
    """clip() returns at most 1 + clip_high; 0 or more."""
    cap: float = 2.0
    """The largest weight under `tis`; above 0."""
    band: tuple[float, float] = (0.5, 5.0)
    """The smallest and the largest k that `icepop` keeps; 0 <= smallest < largest."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: got {self.kind!r}, expected one of {', '.join(get_args(Kind))}")
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low: got {self.clip_low}, expected a number within [0, 1]")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high: got {self.clip_high}, expected a number of at least 0")
        if not self.cap > 0:
            raise ValueError(f"cap: got {self.cap}, expected a number above 0")
        if len(self.band) != 2 or not 0 <= self.band[0] < self.band[1]:
            raise ValueError(f"band: got {self.band}, expected (smallest, largest) with 0 <= smallest < largest")


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """log p/q, safe to exponentiate; [B, T] -> [B, T]."""
    return (log_p - log_q).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def effective_sample_frac(ratio_mean: float, ratio_sq_mean: float) -> float | None:
    """(Σ r)² / (N · Σ r²) of N tokens, from the means of r and r²: 1 where all weigh alike; None without any token."""
    return ratio_mean**2 / ratio_sq_mean if ratio_sq_mean > 0 else None


def token_weights(correction: Correction, *, r: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """The factor of each token's surrogate, before and after the bound of its kind; r, k [B, T] -> [B, T] twice."""
    match correction.kind:
        case "tis":
            return k, k.clamp(max=correction.cap)
        case "icepop":
            smallest, largest = correction.band
            return k, torch.where((k < smallest) | (k > largest), 0.0, k)
        case "decoupled":
            return k, k
        case "cispo":
            return r, r.clamp(max=1 + correction.clip_high)
        case "none" | "ppo" | "gspo":
            return torch.ones_like(r), torch.ones_like(r)
