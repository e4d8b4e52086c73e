"""TrainBatch: the tensors of one micro-batch, built once from rows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from learner.rows import Branch, Row

PROMPT = 0
PADDING = -1


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """R packed rows of L tokens for the model; B branches of T tokens for the objective."""

    tokens: Tensor
    """[R, L] int64; each row is a prompt, then its branches one after the other, then padding."""
    positions: Tensor
    """[R, L] int64; every branch goes on counting from the end of the prompt."""
    segments: Tensor
    """[R, L] int64; PROMPT, 1 … K for the branches, PADDING."""
    sources: Tensor
    """[B, T] int64; where in the flattened [R·L] the token's predecessor stands."""
    targets: Tensor
    """[B, T] int64; the branch's tokens."""
    mask: Tensor
    """[B, T] float32 loss weights."""
    behavior_logprobs: Tensor
    """[B, T] float32; NaN on expert rows."""
    advantages: Tensor
    """[B] float32; NaN on expert rows."""
    temperatures: Tensor
    """[B] float32"""
    is_expert: Tensor
    """[B] bool"""

    @property
    def policy_mask(self) -> Tensor:
        """[B, T] loss weights of policy rows, 0 on expert rows."""
        return self.mask * ~self.is_expert[:, None]

    @property
    def expert_mask(self) -> Tensor:
        """[B, T] loss weights of expert rows, 0 on policy rows."""
        return self.mask * self.is_expert[:, None]

    def to(self, device: torch.device) -> "TrainBatch":
        return TrainBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def attention_mask(self) -> Tensor | None:
        """[R, 1, L, L] bool: a token sees its prompt and what came before in its branch; None where plainly causal."""
        if int(self.segments.max()) <= 1:
            return None
        length = self.tokens.shape[1]
        asking, asked = self.segments[:, :, None], self.segments[:, None, :]
        is_causal = torch.ones(length, length, dtype=torch.bool, device=self.tokens.device).tril()
        is_seen = is_causal & ((asked == PROMPT) | (asked == asking))
        return is_seen[:, None]


def build_batch(rows: Sequence[Row], *, padding_token: int = 0) -> TrainBatch:
    """Lay `rows` out; an empty list gives one padding row without loss, for a rank that has nothing to do."""
    length = max((row.num_tokens for row in rows), default=2)
    num_rows = max(len(rows), 1)
    branches = [branch for row in rows for branch in row.branches]
    width = max((len(branch.tokens) for branch in branches), default=1)
    tokens = np.full((num_rows, length), padding_token, dtype=np.int64)
    positions = np.zeros((num_rows, length), dtype=np.int64)
    segments = np.full((num_rows, length), PADDING if rows else PROMPT, dtype=np.int64)
    sources = np.zeros((max(len(branches), 1), width), dtype=np.int64)
    filled = 0
    for r, row in enumerate(rows):
        start = len(row.prompt)
        tokens[r, :start], positions[r, :start], segments[r, :start] = row.prompt, np.arange(start), PROMPT
        end = start
        for k, branch in enumerate(row.branches):
            size = len(branch.tokens)
            span = slice(end, end + size)
            tokens[r, span], segments[r, span] = branch.tokens, k + 1
            positions[r, span] = np.arange(start, start + size)
            sources[filled, :size] = r * length + np.array([start - 1, *range(end, end + size - 1)])
            filled, end = filled + 1, end + size
    return TrainBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        sources=torch.from_numpy(sources),
        targets=_stack(branches, "tokens", width, np.int64),
        mask=_stack(branches, "mask", width, np.float32),
        behavior_logprobs=_stack(branches, "behavior_logprobs", width, np.float32),
        advantages=torch.tensor([b.advantage for b in branches] or [0.0], dtype=torch.float32),
        temperatures=torch.tensor([b.temperature for b in branches] or [1.0], dtype=torch.float32),
        is_expert=torch.tensor([b.is_expert for b in branches] or [False], dtype=torch.bool),
    )


def _stack(branches: Sequence[Branch], name: str, width: int, dtype: type) -> Tensor:
    stacked = np.zeros((max(len(branches), 1), width), dtype=dtype)
    for row, branch in zip(stacked, branches, strict=False):
        values = getattr(branch, name)
        row[: len(values)] = values
    return torch.from_numpy(stacked)
