"""The sink Weights & Biases: one run of theirs for each of ours, over all starts of its learner.

Their own environment variables say where it goes: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_API_KEY. Online, their
summary of the run tells which points they have, and the others are sent. Offline, each start leaves a folder with the
whole run, in the place of the one before. What was sent cannot be taken back: after a rewind it is another run there.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb

from learner.sinks.sink import Point

PROJECT = "chord-rl"
"""Where WANDB_PROJECT names none."""
FINISH_S = 25.0
"""Longest upload at the end, below feed.CLOSE_S."""


class WeightsAndBiases:
    """`run_id` is theirs too."""

    def __init__(self, folder: Path, *, run_id: str, name: str, config: Mapping[str, Any]) -> None:
        """`folder`: as W&B will have it, the folder `wandb` of some other one."""
        for path in folder.glob(f"offline-run-*-{run_id}"):
            shutil.rmtree(path)
        settings = wandb.Settings(
            console="off", finish_timeout=FINISH_S, finish_timeout_raises=True,
            stop_fn=lambda: None,  # their button to stop a run would interrupt the learner
        )  # fmt: skip
        self._run = wandb.init(
            dir=folder.parent, id=run_id, name=name, config=dict(config), settings=settings,
            project=os.environ.get("WANDB_PROJECT", PROJECT), resume="allow", reinit="create_new",
        )  # fmt: skip
        self._run.define_metric("step", hidden=True)
        for series in ("train/*", "eval/*"):
            self._run.define_metric(series, step_metric="step")
        self._had = {key: value for key, value in dict(self._run.summary).items() if key.endswith("/step")}
        """By series, the step of the last point that they have from before."""

    def add(self, point: Point) -> None:
        cursor = f"{point.series}/step"
        if point.step <= self._had.get(cursor, -1):
            return
        values = {f"{point.series}/{name}": value for name, value in point.values.items()}
        self._run.log({**values, cursor: point.step, "step": point.step, "_timestamp": point.time})

    def close(self) -> None:
        self._run.finish()
