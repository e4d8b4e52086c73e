"""Draws tokens from a model's logits, for the engine that has no sampler of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from actors.engine import SamplingParameters


def draw(logits: Tensor, samplings: Sequence[SamplingParameters], uniforms: Sequence[float]) -> tuple[Tensor, Tensor]:
    """A token per row of `logits` [B, V] and its log-prob [B], by one uniform number in [0, 1) per row.

    Inverse of the cumulative distribution; temperature 0 takes the likeliest token, with its log-prob at temperature 1.
    """
    temperature = torch.tensor([one.temperature for one in samplings], device=logits.device)[:, None]
    scaled = keep_likeliest(logits.float() / torch.where(temperature == 0, 1.0, temperature), samplings)
    logprobs = torch.log_softmax(scaled, dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)  # in float32 the tail of a large vocabulary would be lost
    target = torch.tensor(uniforms, device=logits.device, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    sampled = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(temperature == 0, logprobs.argmax(dim=-1, keepdim=True), sampled)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def keep_likeliest(logits: Tensor, samplings: Sequence[SamplingParameters]) -> Tensor:
    """`logits` [B, V] with what top_k, and then top_p, leave out at -inf; greedy rows stay as they are.

    top_p keeps the fewest likeliest tokens whose probabilities, after top_k, reach it; at least one.
    """
    filters = [(one.top_k or logits.shape[-1], one.top_p) if one.temperature else (logits.shape[-1], 1.0)
               for one in samplings]  # fmt: skip
    if all(top_k >= logits.shape[-1] and top_p == 1 for top_k, top_p in filters):
        return logits
    top_k, top_p = (torch.tensor(values, device=logits.device)[:, None] for values in zip(*filters, strict=True))
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= top_k, -torch.inf)
    probabilities = ordered.double().softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    left_out = (before >= top_p) & (top_p < 1)
    left_out[:, 0] = False
    return torch.full_like(logits, -torch.inf).scatter(1, order, ordered.masked_fill(left_out, -torch.inf))
