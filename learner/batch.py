"""TrainBatch: the tensors of one micro-batch, built once from rows."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.rows import NOTHING, Branch, Row

BranchValues = dict[Branch, NDArray[np.float32]]
"""A number for each token of each branch, [T]."""


@dataclass(frozen=True, eq=False)
class TrainBatch:
    """N tokens of R packed rows for the model, one after the other without padding; B branches of T tokens for the
    objective.
    """

    tokens: Tensor
    """[N] int64; of each row the prompt, then its branches."""
    positions: Tensor
    """[N] int64; every branch goes on counting from the end of its prompt."""
    prompts: Tensor
    """[R, P] int64; where the rows' prompts stand in `tokens`, any place past a prompt's end."""
    prompt_sizes: Tensor
    """[R] int64"""
    branches: Tensor
    """[B, T] int64; where the branches stand in `tokens`, any place past a branch's end."""
    branch_rows: Tensor
    """[B] int64; the row of each branch."""
    slots: Tensor
    """[N] int64; where each token stands in prompts and branches, laid flat one after the other: [R·P + B·T]."""
    sources: Tensor
    """[B, T] int64; where in `tokens` the predecessor of a branch's token stands."""
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
    longest_sequence: int
    """Tokens of the longest prompt and branch that belong together; less than P + T where they are of two rows."""

    @property
    def policy_mask(self) -> Tensor:
        """[B, T] loss weights of policy rows, 0 on expert rows."""
        return self.mask * ~self.is_expert[:, None]

    @property
    def expert_mask(self) -> Tensor:
        """[B, T] loss weights of expert rows, 0 on policy rows."""
        return self.mask * self.is_expert[:, None]

    def to(self, device: torch.device) -> "TrainBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: value.to(device) for name, value in values.items() if isinstance(value, Tensor)})

    @cached_property
    def is_seen(self) -> Tensor:
        """[B, 1, T, P + T] bool: what a branch's token sees of its prompt and of its branch."""
        places = torch.arange(self.prompts.shape[1], device=self.tokens.device)
        in_prompt = places < self.prompt_sizes[self.branch_rows, None]
        width = self.branches.shape[1]
        is_causal = torch.ones(width, width, dtype=torch.bool, device=self.tokens.device).tril()
        num_branches = len(self.branches)
        return torch.cat(
            [in_prompt[:, None, None].expand(-1, 1, width, -1), is_causal.expand(num_branches, 1, -1, -1)], dim=-1
        )


def build_batch(rows: Sequence[Row]) -> TrainBatch:
    """Lay `rows` out; an empty list gives one row without loss, for a rank that has nothing to do."""
    rows = rows or [NOTHING]
    branches = [branch for row in rows for branch in row.branches]
    longest, width = max(len(row.prompt) for row in rows), max(len(branch.tokens) for branch in branches)
    prompts = np.zeros((len(rows), longest), dtype=np.int64)
    places, sources = (np.zeros((len(branches), width), dtype=np.int64) for _ in range(2))
    positions, slots, first_slot, end, b = [], [], len(rows) * longest, 0, 0
    for r, row in enumerate(rows):
        start, size = end, len(row.prompt)
        prompts[r, :size] = np.arange(start, start + size)
        positions.append(np.arange(size))
        slots.append(r * longest + np.arange(size))
        end += size
        for branch in row.branches:
            length = len(branch.tokens)
            places[b, :length] = np.arange(end, end + length)
            sources[b, :length] = [start + size - 1, *range(end, end + length - 1)]
            positions.append(np.arange(size, size + length))
            slots.append(first_slot + b * width + np.arange(length))
            end, b = end + length, b + 1
    return TrainBatch(
        tokens=_join([part for row in rows for part in (row.prompt, *(branch.tokens for branch in row.branches))]),
        positions=_join(positions),
        prompts=torch.from_numpy(prompts),
        prompt_sizes=torch.tensor([len(row.prompt) for row in rows]),
        branches=torch.from_numpy(places),
        branch_rows=torch.tensor([r for r, row in enumerate(rows) for _ in row.branches]),
        slots=_join(slots),
        sources=torch.from_numpy(sources),
        targets=_stack(branches, "tokens", width, np.int64),
        mask=_stack(branches, "mask", width, np.float32),
        behavior_logprobs=_stack(branches, "behavior_logprobs", width, np.float32),
        advantages=torch.tensor([branch.advantage for branch in branches], dtype=torch.float32),
        temperatures=torch.tensor([branch.temperature for branch in branches], dtype=torch.float32),
        is_expert=torch.tensor([branch.is_expert for branch in branches], dtype=torch.bool),
        longest_sequence=max(row.longest_sequence for row in rows),
    )


def num_places(rows: Sequence[Row]) -> int:
    """B · T of the batch that `build_batch` makes of `rows`."""
    branches = [branch for row in rows for branch in row.branches]
    return len(branches) * max(len(branch.tokens) for branch in branches)


def take_apart(values: Tensor, rows: Sequence[Row]) -> BranchValues:
    """The branches' own of `values`, which has one for each of the `num_places` of their batch."""
    branches = [branch for row in rows for branch in row.branches]
    laid_out = values.view(len(branches), -1).numpy()
    return {branch: own[: len(branch.tokens)] for branch, own in zip(branches, laid_out, strict=True)}


def _join(parts: Sequence[NDArray[Any]]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


def _stack(branches: Sequence[Branch], name: str, width: int, dtype: type) -> Tensor:
    stacked = np.zeros((len(branches), width), dtype=dtype)
    for row, branch in zip(stacked, branches, strict=True):
        values = getattr(branch, name)
        row[: len(values)] = values
    return torch.from_numpy(stacked)
