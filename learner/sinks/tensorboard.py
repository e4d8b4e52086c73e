"""The sink TensorBoard: event files in the run directory, written anew from the ledger at every start."""

import os
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from learner.sinks.sink import Point


class TensorBoard:
    """Tags are SERIES/FIELD."""

    def __init__(self, folder: Path) -> None:
        for path in folder.glob("events.out.tfevents.*"):
            _empty(path)
        # A TensorBoard that is looking on has the old file's points still: purge_step tells it to forget them.
        self._writer = SummaryWriter(str(folder), purge_step=0)

    def add(self, point: Point) -> None:
        for name, value in point.values.items():
            self._writer.add_scalar(f"{point.series}/{name}", value, point.step, walltime=point.time)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _empty(path: Path) -> None:
    """A TensorBoard that reads the last file would wait for a deleted one for ever; those before it, it has left."""
    if path.stat().st_size:
        os.truncate(path, 0)
    else:
        path.unlink()
