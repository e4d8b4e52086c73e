"""What an optimizer step leaves of itself in the folder of excerpts: some of its groups, and as many expert rows.

Nothing else is known of a group once checkpoints cover it, and a token's log-prob at training time nowhere else. The
choice is a function of the run's seed and the step, and a step that is replayed keeps its first file.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.trajectory import NOT_SAMPLED, TrajectoryGroup
from learner.batch import BranchValues
from learner.excerpts.folder import ExcerptFolder
from learner.rows import Branch, Row
from learner.step_rows import StepRows


class Excerpts:
    """Written by the train loop, a few milliseconds a step."""

    def __init__(self, folder: ExcerptFolder, *, groups_per_step: int, seed: int) -> None:
        """`groups_per_step`: how many groups of a step, and how many expert rows, are kept; 0 writes nothing."""
        self._folder = folder
        self._groups_per_step = groups_per_step
        self._seed = seed

    def add(self, rows: StepRows, logprobs: BranchValues, actor_ids: Sequence[str]) -> None:
        """Keep an excerpt of a step that was taken; `actor_ids` tells who sampled each of its groups."""
        step = rows.composition.step + 1
        if self._groups_per_step and not self._folder.path_of(step).exists():
            self._folder.write(step, [{"step": step, **row} for row in self._rows(rows, logprobs, actor_ids)])

    def _rows(self, rows: StepRows, logprobs: BranchValues, actor_ids: Sequence[str]) -> Iterator[dict[str, Any]]:
        chance = random.Random(f"{self._seed} {rows.composition.step}")
        num_groups, expert_row_ids = len(rows.groups), rows.composition.expert_row_ids
        for n in self._draw(num_groups, chance):
            of_group = {"group_id": rows.composition.group_ids[n], "actor_id": actor_ids[n]}
            yield from ({**of_group, **row} for row in _rows_of_group(rows.groups[n], rows.rows[n], logprobs))
        for n in self._draw(len(expert_row_ids), chance):
            yield {"expert_row_id": expert_row_ids[n], **_row_of_demonstration(rows.rows[num_groups + n], logprobs)}

    def _draw(self, count: int, chance: random.Random) -> list[int]:
        return sorted(chance.sample(range(count), min(self._groups_per_step, count)))


def _rows_of_group(group: TrajectoryGroup, row: Row, logprobs: BranchValues) -> Iterator[dict[str, Any]]:
    start = group.num_prompt_tokens
    for number, (trajectory, branch) in enumerate(zip(group.trajectories, row.branches, strict=True)):
        versions = trajectory.versions[start:]
        yield {
            "trajectory": number,
            "reward": trajectory.reward,
            "advantage": branch.advantage,
            "is_truncated": trajectory.is_truncated,
            "prompt": row.prompt,
            "tokens": branch.tokens,
            "versions": versions,
            "behavior_logprobs": np.where(versions != NOT_SAMPLED, branch.behavior_logprobs, np.nan),
            "policy_logprobs": _on_loss(branch, logprobs),
        }


def _row_of_demonstration(row: Row, logprobs: BranchValues) -> dict[str, Any]:
    (branch,) = row.branches
    return {"prompt": row.prompt, "tokens": branch.tokens, "policy_logprobs": _on_loss(branch, logprobs)}


def _on_loss(branch: Branch, logprobs: BranchValues) -> NDArray[np.float32]:
    return np.where(branch.mask > 0, logprobs[branch], np.nan)
