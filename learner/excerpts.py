"""Excerpts: some groups and expert rows of the optimizer steps, token by token, for people to look at.

Nothing else is known of a group once checkpoints cover it, and a token's log-prob at training time nowhere else. A file
for each step, `step-00000012.parquet` with what made version 12, a row for each trajectory and each demonstration. The
choice is a function of the run's seed and the step, and a step that is replayed keeps its first file, so none is ever
written with other content; each appears by rename. At most MAX_STEPS + NEWEST_STEPS files are kept, however long a run:
older steps are thinned out evenly, every second one, every fourth, and so on.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common.trajectory import NOT_SAMPLED, TrajectoryGroup
from learner.batch import BranchValues
from learner.rows import Branch, Row
from learner.step_rows import StepRows

MAX_STEPS = 512
"""Steps of a whole run that are kept, evenly spread."""
NEWEST_STEPS = 16
"""Beside them the newest ones, all of them."""
_SUFFIX = ".parquet"

_TOKENS, _LOGPROBS = pa.list_(pa.int32()), pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        ("step", pa.int32()),  # as in metrics.jsonl
        ("group_id", pa.int64()),  # of a trajectory, as in the ledger; null for a demonstration
        ("trajectory", pa.int32()),  # its place in the group, from 0
        ("actor_id", pa.string()),
        ("reward", pa.float32()),
        ("advantage", pa.float32()),
        ("is_truncated", pa.bool_()),
        ("expert_row_id", pa.int64()),  # of a demonstration, as in the expert store; null for a trajectory
        ("prompt", _TOKENS),
        ("tokens", _TOKENS),  # [T] what follows the prompt, replies of the environment among it
        ("versions", _TOKENS),  # [T] as in Trajectory; null for a demonstration, as the next
        ("behavior_logprobs", _LOGPROBS),  # [T], NaN where no policy sampled
        ("policy_logprobs", _LOGPROBS),  # [T] of the policy that the step began with, NaN on what bears no loss
    ]
)


class Excerpts:
    """Written by the train loop, a few milliseconds a step."""

    def __init__(self, folder: Path, *, groups_per_step: int, seed: int) -> None:
        """`groups_per_step`: how many groups of a step, and how many expert rows, are kept; 0 writes nothing."""
        self._folder = folder
        self._groups_per_step = groups_per_step
        self._seed = seed

    def add(self, rows: StepRows, logprobs: BranchValues, actor_ids: Sequence[str]) -> None:
        """Keep an excerpt of a step that was taken; `actor_ids` tells who sampled each of its groups."""
        step = rows.composition.step + 1
        path = self._folder / f"step-{step:08d}{_SUFFIX}"
        if self._groups_per_step == 0 or path.exists():
            return
        table = pa.Table.from_pylist([{"step": step, **row} for row in self._rows(rows, logprobs, actor_ids)], SCHEMA)
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd")
        self._folder.mkdir(exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)
        self._thin_out()

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

    def _thin_out(self) -> None:
        steps = excerpts_in(self._folder)
        for step, path in steps.items():
            if not is_kept(step, newest=max(steps)):
                path.unlink(missing_ok=True)


def excerpts_in(folder: Path) -> dict[int, Path]:
    """The files of a run by step, oldest first."""
    return {int(path.stem.removeprefix("step-")): path for path in sorted(folder.glob(f"step-*{_SUFFIX}"))}


def is_kept(step: int, *, newest: int) -> bool:
    """Whether the excerpt of `step` is still there when `newest` was written last."""
    stride = 1 << ((newest - 1) // MAX_STEPS).bit_length()  # newest // stride is at most MAX_STEPS
    return step % stride == 0 or step > newest - NEWEST_STEPS


def forget_later(folder: Path, step: int) -> None:
    """Delete the excerpts of all steps after `step`, which a rewind has undone."""
    for later, path in excerpts_in(folder).items():
        if later > step:
            path.unlink(missing_ok=True)


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
