"""The section `[run]`: where a run lies, what chord-local starts for it and mends in it, and where its numbers go."""

from enum import StrEnum
from typing import Literal

from pydantic import Field

from common.config.section import Count, Seconds, Section


class SinkName(StrEnum):
    """Each is a package of that name, and an extra of ours."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


class Run(Section):
    dir: str = Field("runs/default", min_length=1, description="run directory: everything a run writes lies here")
    seed: Count = Field(0, description="seeds prompts, sampling, expert order and initial random states")
    sinks: tuple[SinkName, ...] = Field(
        (), description="where the learner shows steps and evaluations besides: tensorboard, wandb"
    )
    num_actors: Count = Field(2, description="actor processes that chord-local starts")
    pin_cores: Literal["auto", "split", "none"] = Field(
        "auto",
        description="chord-local gives each process cores of its own: auto where all set num_threads fit, split in "
        "any case, none leaves it to the system",
    )
    watchdog_s: Seconds = Field(60.0, description="a component stuck or without a sign of life for longer is ended")
    first_sign_s: Seconds = Field(
        300.0, description="longest time from a component's start to its first sign of life, to chord-local"
    )
    max_crashes: Count = Field(5, description="crashes of one component in crash_window_s that chord-local mends")
    crash_window_s: Seconds = Field(300.0, description="crashes longer ago are forgiven")
    excerpt_groups_per_step: Count = Field(
        2, description="groups of a step, and as many expert rows, kept token by token for chord-report; 0: none"
    )
