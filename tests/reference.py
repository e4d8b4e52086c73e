"""The objective once more, in NumPy float64 and plain loops: slow on purpose, to be read beside the paper.

Nothing here is shared with `learner/objective`. Gradients, with respect to log π_θ of each token, are written out by
hand. Masked tokens are never read. Equations: CHORD, arXiv 2508.11408; corrections as listed in `Correction.kind`.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LIMIT = 20.0


@dataclass(frozen=True)
class Outcome:
    """What a loss gives for a batch."""

    loss: float
    grad: Array
    """[B, T], with respect to log π_θ."""
    metrics: dict[str, float]


def mu(step: int, peak: float, valley: float, warmup: int, decay: int) -> float:
    if step < warmup:
        return peak * step / warmup
    if step >= warmup + decay:
        return valley
    return valley + (peak - valley) * (1 + math.cos(math.pi * (step - warmup) / decay)) / 2


def adaptive_mu(mean_reward: float, target: float) -> float:
    mu = target - mean_reward
    return 0.0 if mu < 0 else 1.0 if mu > 1 else mu


def effective_mu(mu: float, policy_norm: float, expert_norm: float) -> float:
    """The expert half's share of the two gradients' lengths."""
    total = mu * expert_norm + (1 - mu) * policy_norm
    return 0.0 if total == 0 else mu * expert_norm / total


def soft_overlong_penalty(length: int, max_tokens: int, buffer_tokens: int) -> float:
    """DAPO, arXiv 2503.14476, equation 13."""
    if length <= max_tokens - buffer_tokens:
        return 0.0
    if length <= max_tokens:
        return ((max_tokens - buffer_tokens) - length) / buffer_tokens
    return -1.0


def loss_weights(mask: Array, aggregation: str) -> Array:
    """What each token of a sequence counts for; their sum over a step is the denominator of its half."""
    num_tokens = sum(m > 0 for m in mask)
    return np.array([m / num_tokens if aggregation == "sequence_mean" else m for m in mask])


def advantages(rewards: Array, scale: str, eps: float) -> Array:
    K = len(rewards)
    mean = sum(rewards) / K
    if len(set(rewards)) == 1:
        return np.zeros(K)
    std = math.sqrt(sum((R - mean) ** 2 for R in rewards) / (K - 1))
    return np.array([(R - mean) / (std + eps if scale == "std" else 1.0) for R in rewards])


def expert(logprobs: Array, mask: Array, weighting: str, num_tokens: float) -> Outcome:
    """− 1/N Σ_i Σ_t m · φ · log p, where φ is a constant."""
    N = max(num_tokens, 1.0)
    loss, grad = 0.0, np.zeros_like(logprobs)
    metrics = dict.fromkeys(["phi_mean", "p_lt_01_frac", "p_gt_09_frac", "nll_mean"], 0.0)
    for i, t in np.ndindex(logprobs.shape):
        m, log_p = float(mask[i, t]), float(logprobs[i, t])
        if m == 0:
            continue
        p = math.exp(log_p)
        phi = {"phi": p * (1 - p), "is": p, "none": 1.0}[weighting]
        loss -= m * phi * log_p / N
        grad[i, t] = -m * phi / N
        metrics["phi_mean"] += m * phi / N
        metrics["p_lt_01_frac"] += m * (p < 0.1) / N
        metrics["p_gt_09_frac"] += m * (p > 0.9) / N
        metrics["nll_mean"] -= m * log_p / N
    return Outcome(loss, grad, metrics)


def ratio(log_p: float, log_q: float) -> tuple[float, float]:
    """p/q within e^±20, and its derivative with respect to log p."""
    d = log_p - log_q
    if abs(d) > LIMIT:
        return math.exp(math.copysign(LIMIT, d)), 0.0
    return math.exp(d), math.exp(d)


def clipped(x: float, A: float, low: float, high: float) -> tuple[float, float, bool]:
    """min(x·A, clip(x)·A), its derivative with respect to x, and whether the clip decides."""
    bounded = min(max(x, 1 - low), 1 + high) * A
    return (bounded, 0.0, True) if bounded < x * A else (x * A, A, False)


def policy(
    logprobs: Array,
    behavior: Array,
    advantages: Array,
    mask: Array,
    num_tokens: float,
    proximal: Array | None = None,
    *,
    kind: str,
    clip_low: float,
    clip_high: float,
    cap: float,
    band: tuple[float, float],
) -> Outcome:
    """− 1/N Σ_i Σ_t m · (the term of `kind`)."""
    N = max(num_tokens, 1.0)
    B, T = logprobs.shape
    loss, grad = 0.0, np.zeros_like(logprobs)
    names = ["clip_frac", "cap_frac", "masked_frac", "ratio_mean", "ratio_sq_mean", "mismatch_kl"]
    metrics = dict.fromkeys(names, 0.0)
    for i in range(B):
        A = advantages[i]
        live = [t for t in range(T) if mask[i, t] > 0]
        row_weight = sum(mask[i, t] for t in live)

        # The geometric mean of the row's ratios, for gspo alone.
        logs = {t: min(max(logprobs[i, t] - behavior[i, t], -LIMIT), LIMIT) for t in live}
        s = math.exp(sum(mask[i, t] * logs[t] for t in live) / row_weight) if live else 1.0

        for t in live:
            m, log_pi = mask[i, t], logprobs[i, t]
            log_prox = log_pi if proximal is None else proximal[i, t]
            r, dr = ratio(log_pi, behavior[i, t])
            k, _ = ratio(log_prox, behavior[i, t])
            u, du = ratio(log_pi, log_prox)
            is_clipped = is_cut = is_rejected = False

            # term: what is maximised; slope: its derivative with respect to log π_θ of this token.
            if kind == "none":
                term, slope = A * log_pi, A
            elif kind == "ppo":
                term, d_term, is_clipped = clipped(r, A, clip_low, clip_high)
                slope = d_term * dr
            elif kind == "gspo":
                # All of the row's terms hold s, so this token moves each: Σ_t' m_t' · s · m_t/Σ_t' m_t' = m_t · s.
                term, d_term, is_clipped = clipped(s, A, clip_low, clip_high)
                slope = d_term * s if dr != 0 else 0.0
            elif kind == "cispo":
                is_cut = r > 1 + clip_high
                w = 1 + clip_high if is_cut else r
                term, slope = w * A * log_pi, w * A
            else:
                is_cut = kind == "tis" and k > cap
                is_rejected = kind == "icepop" and not band[0] <= k <= band[1]
                w = 0.0 if is_rejected else cap if is_cut else k
                term, d_term, is_clipped = clipped(u, A, clip_low, clip_high)
                term, slope = w * term, w * d_term * du

            loss -= m * term / N
            grad[i, t] = -m * slope / N
            metrics["clip_frac"] += m * is_clipped / N
            metrics["cap_frac"] += m * is_cut / N
            metrics["masked_frac"] += m * is_rejected / N
            metrics["ratio_mean"] += m * r / N
            metrics["ratio_sq_mean"] += m * r**2 / N
            metrics["mismatch_kl"] += m * (r - 1 - logs[t]) / N
    return Outcome(loss, grad, metrics)


def chord(policy: Outcome, expert: Outcome, mu: float) -> tuple[float, Array, Array]:
    """A whole step: (1 − μ) · L_GRPO + μ · L_SFT, and its gradients on policy and on expert tokens."""
    return (1 - mu) * policy.loss + mu * expert.loss, (1 - mu) * policy.grad, mu * expert.grad
