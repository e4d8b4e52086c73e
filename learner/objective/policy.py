"""The policy half of CHORD: GRPO over every policy token of the optimizer step, corrected for off-policy sampling."""

import torch
from torch import Tensor

from learner.objective.importance import Correction, log_ratio, token_weights


def policy_loss(
    logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    correction: Correction,
    num_tokens: float,
    proximal_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    L_GRPO (arXiv 2508.11408): − 1/N · Σ m · w · surrogate, with the terms that `Correction.kind` lists.

    Log-probs and mask are [B, T], advantages [B]. N is `num_tokens`, the policy tokens of the whole optimizer step;
    clipped and rejected tokens stay in it. `proximal_logprobs` None means one step per batch: π_prox = sg(π_θ).

    Metrics are sums over the micro-batch divided by N, so micro-batches add up to the mean over the step's tokens:

    - `clip_frac`: tokens whose surrogate takes the clipped branch
    - `cap_frac`: tokens whose weight is cut (`tis` at cap, `cispo` at 1 + clip_high)
    - `masked_frac`: tokens that `icepop` rejects
    - `ratio_mean`, `ratio_sq_mean`: r = π_θ/π_b and r²; ratio_mean²/ratio_sq_mean is the effective sample size over N
    - `mismatch_kl`: r − 1 − log r, the k3 estimator of KL(π_b ‖ π_θ)
    """
    assert logprobs.shape == behavior_logprobs.shape == mask.shape
    assert advantages.shape == mask.shape[:1]
    N = max(num_tokens, 1.0)

    # Whatever a masked entry holds is replaced before it meets any arithmetic.
    live = mask > 0
    A = torch.where(live, advantages[:, None], 0.0)
    log_pi = torch.where(live, logprobs, 0.0)
    log_pi_b = torch.where(live, behavior_logprobs, 0.0)
    log_pi_prox = log_pi.detach()
    if proximal_logprobs is not None:
        log_pi_prox = torch.where(live, proximal_logprobs, 0.0).detach()

    # r = π_θ/π_b, k = π_prox/π_b, u = π_θ/π_prox, each [B, T].
    log_r = log_ratio(log_pi, log_pi_b)
    r, k, u = log_r.exp(), log_ratio(log_pi_prox, log_pi_b).exp(), log_ratio(log_pi, log_pi_prox).exp()

    # The weight is a constant to the gradient.
    free, w = token_weights(correction, r=r.detach(), k=k)

    # What the weight multiplies [B, T]; without a ratio in it there is nothing to clip.
    match correction.kind:
        case "none" | "cispo":
            surrogate, is_clipped = A * log_pi, torch.zeros_like(live)
        case "ppo":
            surrogate, is_clipped = clipped_surrogate(r, A, correction)
        case "gspo":
            surrogate, is_clipped = clipped_surrogate(row_mean(log_r, mask).exp(), A, correction)
        case "tis" | "icepop" | "decoupled":
            surrogate, is_clipped = clipped_surrogate(u, A, correction)

    loss = -(mask * w * surrogate).sum() / N

    # A weight of zero is a rejection, since a clamped ratio is never zero.
    is_rejected = w == 0
    r, log_r = r.detach(), log_r.detach()
    per_token = {
        "clip_frac": is_clipped,
        "cap_frac": (w < free) & ~is_rejected,
        "masked_frac": is_rejected,
        "ratio_mean": r,
        "ratio_sq_mean": r.square(),
        "mismatch_kl": log_r.expm1() - log_r,
    }
    return loss, {name: (mask * value).sum() / N for name, value in per_token.items()}


def clipped_surrogate(ratio: Tensor, A: Tensor, correction: Correction) -> tuple[Tensor, Tensor]:
    """min(ratio·A, clip(ratio)·A), and where the second is the smaller; ratio [B, T] or [B, 1], A [B, T] -> [B, T]."""
    free = ratio * A
    clipped = ratio.clamp(1 - correction.clip_low, 1 + correction.clip_high) * A
    return torch.minimum(free, clipped), clipped < free


def row_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over each row's tokens weighted by the mask, 0 for a row without any; [B, T] -> [B, 1]."""
    total = mask.sum(-1, keepdim=True)
    return (mask * values).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0)
