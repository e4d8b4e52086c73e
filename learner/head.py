"""The head: log-probs and entropies of tokens, from hidden states, without the logits of all of them at a time.

Logits exist for `chunk_tokens` positions at a time. The backward pass computes them again, as what it needs of them
is as large as they are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


class Head(nn.Module):
    """The output layer. A module that is called once, however many chunks, so that ranks with sharded weights gather
    it alike.
    """

    def __init__(self, layer: nn.Linear, *, chunk_tokens: int) -> None:
        super().__init__()
        self._layer = (layer,)
        """In a tuple, lest its parameters were registered a second time, under another name."""
        self._chunk_tokens = chunk_tokens

    @property
    def linear(self) -> nn.Linear:
        return self._layer[0]

    def forward(self, hidden: Tensor, targets: Tensor, temperatures: Tensor) -> tuple[Tensor, Tensor]:
        """[N, H] hidden states to ([N] log-probs, [N] entropies); see `token_scores`."""
        layer = self.linear
        return token_scores(hidden, layer.weight, layer.bias, targets, temperatures, chunk_tokens=self._chunk_tokens)


def token_scores(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor,
    *,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """([N] log-probs of the targets with gradient, [N] entropies without), float32, in nats.

    `hidden` [N, H], `weight` [V, H], `bias` [V] or None, `targets` [N] int64, `temperatures` [N]: what a position's
    logits are divided by.
    """
    return _TokenScores.apply(hidden, weight, bias, targets, temperatures, chunk_tokens)  # pyright: ignore


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperatures: Tensor, size: int
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies, totals = (torch.empty_like(temperatures) for _ in range(3))
        for chunk in _chunks(len(hidden), size):
            scaled = _scaled_logits(hidden[chunk], weight, bias, temperatures[chunk])
            totals[chunk] = scaled.logsumexp(-1)
            logprobs[chunk] = scaled.gather(1, targets[chunk, None]).squeeze(1) - totals[chunk]
            probs = (scaled - totals[chunk, None]).exp_()
            # H = log Z − Σ p·logit
            entropies[chunk] = totals[chunk] - torch.bmm(probs[:, None], scaled[:, :, None]).flatten()
        ctx.save_for_backward(hidden, weight, bias, targets, temperatures, totals)
        ctx.size = size
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperatures, totals = ctx.saved_tensors
        scale = grads[0] / temperatures
        d_hidden = torch.empty_like(hidden)
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        for chunk in _chunks(len(hidden), ctx.size):
            probs = _scaled_logits(hidden[chunk], weight, bias, temperatures[chunk])
            probs.sub_(totals[chunk, None]).exp_()
            # d log p(target) / d logits = 1[target] − p
            d_logits = probs.mul_(-scale[chunk, None])
            d_logits.scatter_add_(1, targets[chunk, None], scale[chunk, None])
            d_logits = d_logits.to(weight.dtype)
            d_hidden[chunk] = d_logits @ weight
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, hidden[chunk])
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        return d_hidden, d_weight, d_bias, None, None, None


def _chunks(length: int, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, length, size))


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperatures: Tensor) -> Tensor:
    """[n, V] float32, a tensor of its own."""
    return linear(hidden, weight, bias).float().div_(temperatures[:, None])
