"""Attention over packed rows: prompts see themselves, branches their row's prompt and themselves.

The two are computed apart, so that its cost is that of every branch alone with a prompt that was computed once: nothing
is spent on pairs of tokens of different branches, and no mask is as large as a row is long, squared.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from common.errors import OperatorError
from learner.batch import TrainBatch

NAME = "chord_packed"
UNKNOWN = ("softcap", "s_aux", "position_bias")
"""What some architectures add to attention, and this one does not."""


def register() -> None:
    """Offer this attention to transformers under NAME; a decoder is to be given the batch as `packed`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: TrainBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query [1, heads, N, D], key and value [1, heads of keys, N, D] to [1, N, heads, D].

    Without a batch it is the plain causal attention of transformers.
    """
    if packed is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    _refuse_others(kwargs, length=packed.longest_sequence)
    how = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    of_prompts = [_take(tensor, packed.prompts) for tensor in (query, key, value)]
    of_branches = [_take(tensor, packed.branches) for tensor in (query, key, value)]
    keys, values = (
        torch.cat([prompt[packed.branch_rows], branch], dim=2)
        for prompt, branch in zip(of_prompts[1:], of_branches[1:], strict=True)
    )
    from_prompts = scaled_dot_product_attention(*of_prompts, is_causal=True, **how)
    from_branches = scaled_dot_product_attention(of_branches[0], keys, values, attn_mask=packed.is_seen, **how)
    together = torch.cat([_flatten(from_prompts), _flatten(from_branches)])
    return together[packed.slots][None], None


def _take(tensor: Tensor, places: Tensor) -> Tensor:
    """[1, heads, N, D] at [S, T] places to [S, heads, T, D]."""
    return tensor[0][:, places].transpose(0, 1)


def _flatten(tensor: Tensor) -> Tensor:
    """[S, heads, T, D] to [S·T, heads, D]."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _refuse_others(kwargs: dict[str, Any], *, length: int) -> None:
    window = kwargs.get("sliding_window")
    if window is not None and window < length:
        raise OperatorError(
            f"model.path: got attention over the last {window} tokens only and a row of {length}, expected attention "
            "over all of them"
        )
    if found := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise OperatorError(f"model.path: got attention with {', '.join(found)}, expected plain causal attention")
