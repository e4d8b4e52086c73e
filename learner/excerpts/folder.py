"""The folder of excerpts: a file for each step, `step-00000012.parquet` with what made version 12.

A row is a trajectory or a demonstration. No file is written twice, and each appears by rename. At most MAX_STEPS +
NEWEST_STEPS are kept, however long a run: older steps are thinned out to every second one, every fourth, and so on.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

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


class ExcerptFolder:
    """Written by one learner, read by anyone meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def path_of(self, step: int) -> Path:
        return self._path / f"step-{step:08d}{_SUFFIX}"

    def files(self) -> dict[int, Path]:
        """By step, oldest first."""
        found = sorted(self._path.glob(f"step-*{_SUFFIX}"))
        return {int(path.stem.removeprefix("step-")): path for path in found}

    def write(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), buffer, compression="zstd")
        self._path.mkdir(exist_ok=True)
        path = self.path_of(step)
        partial = path.with_suffix(".partial")
        partial.write_bytes(buffer.getvalue())
        partial.replace(path)
        self._thin_out()

    def _thin_out(self) -> None:
        files = self.files()
        for step, path in files.items():
            if not is_kept(step, newest=max(files)):
                path.unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Delete the excerpts of all steps after `step`."""
        for later, path in self.files().items():
            if later > step:
                path.unlink(missing_ok=True)


def is_kept(step: int, *, newest: int) -> bool:
    """Whether the excerpt of `step` is still there when `newest` is the newest."""
    stride = 1 << ((newest - 1) // MAX_STEPS).bit_length()  # newest // stride is at most MAX_STEPS
    return step % stride == 0 or step > newest - NEWEST_STEPS
