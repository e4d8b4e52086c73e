"""Rows of an optimizer step before they are tensors: a prompt and the branches that continue it.

A policy group is one row with K branches, an expert demonstration a row with one. The prompt of a row is computed once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.chat import Demonstration
from common.trajectory import TrajectoryGroup

Aggregation = Literal["token_mean", "sequence_mean"]

EXPERT_TEMPERATURE = 1.0
"""Expert log-probs are taken at temperature 1, whatever the rollouts' is (CHORD.md)."""


@dataclass(frozen=True, eq=False)
class Branch:
    """What follows the prompt in one trajectory or demonstration, T tokens."""

    tokens: NDArray[np.int32]
    """[T]"""
    mask: NDArray[np.float32]
    """[T] loss weight, 0 on what the policy or the expert did not write."""
    behavior_logprobs: NDArray[np.float32]
    """[T]; NaN for expert branches, which have no behaviour policy."""
    advantage: float
    """NaN for expert branches."""
    temperature: float
    is_expert: bool


@dataclass(frozen=True, eq=False)
class Row:
    """A prompt with its branches."""

    prompt: NDArray[np.int32]
    """[P], P >= 1"""
    branches: tuple[Branch, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens that are computed for this row."""
        return len(self.prompt) + sum(len(branch.tokens) for branch in self.branches)


NOTHING = Row(
    np.zeros(1, dtype=np.int32),
    (Branch(*(np.zeros(1, dtype=kind) for kind in (np.int32, np.float32, np.float32)), 0.0, 1.0, is_expert=False),),
)
"""A row without loss."""


def policy_row(
    group: TrajectoryGroup, advantages: Sequence[float], *, temperature: float, aggregation: Aggregation
) -> Row:
    """A group as a row, with an advantage for each of its trajectories."""
    start = group.num_prompt_tokens
    branches = tuple(
        Branch(
            t.tokens[start:], loss_weights(t.mask[start:], aggregation), t.logprobs[start:], advantage, temperature,
            is_expert=False,
        )
        for t, advantage in zip(group.trajectories, advantages, strict=True)
    )  # fmt: skip
    return Row(group.trajectories[0].tokens[:start], branches)


def expert_row(demonstration: Demonstration, *, aggregation: Aggregation) -> Row:
    """A demonstration as a row; its prompt ends where the first loss-bearing token begins."""
    start = demonstration.mask.index(1.0)
    tokens = np.array(demonstration.tokens, dtype=np.int32)
    weights = loss_weights(np.array(demonstration.mask[start:], dtype=np.float32), aggregation)
    nothing = np.full(len(weights), np.nan, dtype=np.float32)
    branch = Branch(tokens[start:], weights, nothing, float("nan"), EXPERT_TEMPERATURE, is_expert=True)
    return Row(tokens[:start], (branch,))


def loss_weights(mask: NDArray[np.float32], aggregation: Aggregation) -> NDArray[np.float32]:
    """[T] weights whose sum over the step is the denominator of its half: of a sequence mean, the sequences."""
    total = mask.sum()
    return mask if aggregation == "token_mean" or total == 0 else mask / total


def unshare(rows: Iterable[Row]) -> list[Row]:
    """One row for each branch: every branch computes the prompt for itself."""
    return [replace(row, branches=(branch,)) for row in rows for branch in row.branches]


def split_to_budget(row: Row, budget: int) -> list[Row]:
    """Rows of at most `budget` tokens each, as far as single branches allow."""
    parts: list[list[Branch]] = [[]]
    size = len(row.prompt)
    for branch in row.branches:
        if parts[-1] and size + len(branch.tokens) > budget:
            parts.append([])
            size = len(row.prompt)
        parts[-1].append(branch)
        size += len(branch.tokens)
    return [replace(row, branches=tuple(part)) for part in parts]


def deal(rows: Sequence[Row], num_ranks: int) -> list[list[Row]]:
    """Rows to ranks, longest first to the least loaded, so that ranks finish together."""
    shares: list[list[Row]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for row in sorted(rows, key=lambda row: row.num_tokens, reverse=True):
        rank = load.index(min(load))
        shares[rank].append(row)
        load[rank] += row.num_tokens
    return shares


def micro_batches(rows: Sequence[Row], budget: int) -> list[list[Row]]:
    """Rows of similar length together, each list at most `budget` tokens (a longer row stands alone)."""
    batches: list[list[Row]] = []
    load = 0
    for row in sorted(rows, key=lambda row: row.num_tokens, reverse=True):
        if not batches or load + row.num_tokens > budget:
            batches.append([])
            load = 0
        batches[-1].append(row)
        load += row.num_tokens
    return batches
