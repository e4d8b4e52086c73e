"""CHORD (arXiv 2508.11408): the schedule of μ, the expert half of the loss, and how the two halves are joined."""

import math
from typing import Literal

import torch
from torch import Tensor

UNLIKELY_P, LIKELY_P = 0.1, 0.9
"""Expert tokens below and above are counted: there φ = p(1 − p) < 0.09, so little is learned from them."""


def mu_at(step: int, *, peak: float, valley: float, warmup_steps: int, decay_steps: int) -> float:
    """μ at an optimizer step, counted from 0: linear from 0 to peak, cosine from peak to valley, then valley."""
    for name, count in {"step": step, "warmup_steps": warmup_steps, "decay_steps": decay_steps}.items():
        if count < 0:
            raise ValueError(f"{name}: got {count}, expected 0 or more")
    for name, mu in {"peak": peak, "valley": valley}.items():
        if not 0 <= mu <= 1:
            raise ValueError(f"{name}: got {mu}, expected a number within [0, 1]")
    if decay_steps == 0 and peak != valley:
        raise ValueError(f"decay_steps: got 0, expected 1 or more to go from peak {peak} to valley {valley}")

    if step < warmup_steps:
        return peak * step / warmup_steps
    if step >= warmup_steps + decay_steps:
        return valley
    return valley + (peak - valley) * 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps))


def adaptive_mu(mean_reward: float, *, target: float) -> float:
    """μ = max(0, τ − mean reward), at most 1: the ablation of arXiv 2508.11408 in which μ follows the reward."""
    return min(1.0, max(0.0, target - mean_reward))


def effective_mu(mu: float, *, policy_norm: float, expert_norm: float) -> float:
    """μ‖g_sft‖ / (μ‖g_sft‖ + (1 − μ)‖g_rl‖): the expert half's share of the gradient; 0 where both vanish."""
    expert, policy = mu * expert_norm, (1 - mu) * policy_norm
    return expert / (expert + policy) if expert + policy > 0 else 0.0


def expert_loss(
    logprobs: Tensor, mask: Tensor, *, weighting: Literal["phi", "is", "none"], num_tokens: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    L_SFT (arXiv 2508.11408, CHORD-φ): − 1/N · Σ m · φ · log p, where p = π_θ(expert token) at temperature 1.

    φ is a constant to the gradient: p(1 − p) for `phi`, p for `is` (DFT, arXiv 2508.05629), 1 for `none`.
    Log-probs and mask are [B, T]. N is `num_tokens`, the expert tokens of the whole optimizer step.

    Metrics are sums over the micro-batch divided by N, so micro-batches add up to the mean over the step's tokens:

    - `phi_mean`: φ, whichever weighting it is
    - `p_lt_01_frac`, `p_gt_09_frac`: tokens with p < 0.1, and with p > 0.9
    - `nll_mean`: − log p, unweighted
    """
    assert logprobs.shape == mask.shape
    N = max(num_tokens, 1.0)

    # Whatever a masked entry holds is replaced before it meets any arithmetic.
    log_p = torch.where(mask > 0, logprobs, 0.0)

    # With a gradient through φ, tokens below p = 0.2356 would be unlearned.
    p = log_p.detach().exp()
    match weighting:
        case "phi":
            phi = p * (1 - p)
        case "is":
            phi = p
        case "none":
            phi = torch.ones_like(p)
        case _:
            raise ValueError(f"weighting: got {weighting!r}, expected one of phi, is, none")

    loss = -(mask * phi * log_p).sum() / N

    per_token = {
        "phi_mean": phi,
        "p_lt_01_frac": p < UNLIKELY_P,
        "p_gt_09_frac": p > LIKELY_P,
        "nll_mean": -log_p.detach(),
    }
    return loss, {name: (mask * value).sum() / N for name, value in per_token.items()}


def chord_loss(policy: Tensor, expert: Tensor, *, mu: float) -> Tensor:
    """L_CHORD = (1 − μ) · L_GRPO + μ · L_SFT (arXiv 2508.11408); scalars."""
    return (1 - mu) * policy + mu * expert
