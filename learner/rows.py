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

PLACES_PER_TOKEN = 2
"""Places, padding included, that attention may compute for each token of the budget. With 1, groups of short answers
would need half as many micro-batches again; with no bound, one long demonstration among them makes it nearly 6."""


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

    @property
    def longest_branch(self) -> int:
        """Tokens."""
        return max(len(branch.tokens) for branch in self.branches)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the prompt with its longest branch: what attention spans."""
        return len(self.prompt) + self.longest_branch


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


def num_padded_places(rows: Sequence[Row]) -> int:
    """R · P + B · T of the batch that `build_batch` makes of `rows`: the places that attention computes."""
    num_branches = sum(len(row.branches) for row in rows)
    return len(rows) * max(len(row.prompt) for row in rows) + num_branches * max(row.longest_branch for row in rows)


def fits(rows: Sequence[Row], budget: int) -> bool:
    """Whether `rows` may be one micro-batch: at most `budget` tokens, and in attention, which pads, places for them."""
    is_within = sum(row.num_tokens for row in rows) <= budget
    return is_within and num_padded_places(rows) <= PLACES_PER_TOKEN * budget


def split_to_budget(row: Row, budget: int) -> list[Row]:
    """Rows that each fit into a micro-batch, as far as single branches allow; long branches apart from short ones."""
    if fits([row], budget):
        return [row]
    parts: list[Row] = []
    for branch in sorted(row.branches, key=lambda branch: len(branch.tokens), reverse=True):
        if parts and fits([longer := replace(row, branches=(*parts[-1].branches, branch))], budget):
            parts[-1] = longer
        else:
            parts.append(replace(row, branches=(branch,)))
    return parts


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
    """Rows with branches of similar length together, as many in a list as fit; what does not fit stands alone."""
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: (row.longest_branch, len(row.prompt)), reverse=True):
        if batches and fits([*batches[-1], row], budget):
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
