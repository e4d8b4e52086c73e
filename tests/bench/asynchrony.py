"""What asynchrony buys: optimizer steps per hour and idle shares at max_staleness 0, 1 and 4, for the same work.

One learner and one vLLM actor, each with one core of its own, take the same steps with the same prompts. At staleness 0
they take turns, and the two turns are measured there: generation is what the learner waits for (the actor fetches and
loads the version, samples, scores and sends), training is all the rest of a step, publishing included. No schedule can
make a step shorter than the longer turn: the limit of the speed-up is (generation + training) / max(generation,
training).
"""

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.figure import Bar, Figure
from tests.runs import read_lines, write_config

MODEL = Path("models/smollm2-135m")
STALENESS = (0, 1, 4)
NUM_STEPS = 12
NUM_WARM_STEPS = 3
"""Left out: the first wait for the engine, and the pipeline fills."""
GROUP_SIZE, MAX_TOKENS = 8, 48
"""Chosen so that generation and training take about equally long, where asynchrony has most to gain."""
RUN_S = 400.0
BAR = Bar(at_least=0.85)


@dataclass(frozen=True)
class Turns:
    """One run's later steps."""

    max_staleness: int
    step_s: list[float]
    """From one optimizer step to the next."""
    wait_s: list[float]
    """The learner's, for groups."""
    sampling_s: float
    """Mean, from the lease of a group to its end."""
    actor_idle_frac: float
    staleness: int
    """The largest that was trained."""

    @property
    def mean_step_s(self) -> float:
        return statistics.fmean(self.step_s)

    @property
    def generation_s(self) -> float:
        """At staleness 0; a median, so that a step which the machine held up does not flatter the others."""
        return statistics.median(self.wait_s)

    @property
    def training_s(self) -> float:
        return statistics.median(step_s - wait_s for step_s, wait_s in zip(self.step_s, self.wait_s, strict=True))

    @property
    def steps_per_hour(self) -> float:
        return 3600 / self.mean_step_s

    def describe(self) -> str:
        spread = f"{min(self.step_s):.1f} to {max(self.step_s):.1f}"
        return (
            f"step {self.mean_step_s:.2f} s ({spread}, {len(self.step_s)} steps); idle: learner "
            f"{sum(self.wait_s) / sum(self.step_s):.0%} actor {self.actor_idle_frac:.0%}; staleness {self.staleness}"
        )


def measure(say: Callable[[str], None]) -> list[Figure]:
    with tempfile.TemporaryDirectory(prefix="chord-bench-") as folder:
        runs: list[Turns] = []
        for max_staleness in STALENESS:
            runs.append(take_turns(Path(folder), max_staleness))
            say(f"max_staleness {max_staleness}: {runs[-1].describe()}")
    return figures_of(runs[0], runs[1:])


def figures_of(synchronous: Turns, others: Sequence[Turns]) -> list[Figure]:
    generation_s, training_s = synchronous.generation_s, synchronous.training_s
    turns_s = generation_s + training_s
    limit = turns_s / max(generation_s, training_s)
    work = (
        f"SmolLM2-135M float32, a group of {GROUP_SIZE} answers of at most {MAX_TOKENS} tokens a step; "
        "learner and one vLLM actor with a core each"
    )
    turns = f"generation {generation_s:.2f} s, training {training_s:.2f} s, limit {limit:.2f}×"
    figures = [
        Figure(
            "max_staleness 0", "steps/hour", 3600 / turns_s,
            conditions=f"{work}; {synchronous.describe()}; {turns}; a group takes {synchronous.sampling_s:.2f} s",
        )
    ]  # fmt: skip
    for run in others:
        figures.append(
            Figure(
                f"max_staleness {run.max_staleness}", "steps/hour", run.steps_per_hour,
                against="max_staleness 0", other=3600 / turns_s, conditions=run.describe(),
            )
        )  # fmt: skip
        figures.append(
            Figure(
                f"max_staleness {run.max_staleness}: speed-up over 0", "×", turns_s / run.mean_step_s,
                against="limit: the longer of the two turns", other=limit, bar=BAR, conditions=turns,
            )
        )  # fmt: skip
    return figures


def take_turns(folder: Path, max_staleness: int, **sections: dict[str, Any]) -> Turns:
    """One whole run of `chord-local`; `sections` override its configuration."""
    home = folder / f"staleness-{max_staleness}"
    home.mkdir()
    own: dict[str, dict[str, Any]] = {
        "run": {"dir": str(home / "run"), "num_actors": 1},
        "actor": {
            "engine": "vllm", "dtype": "float32", "max_groups_in_flight": 0, "max_model_tokens": 256, "num_threads": 1
        },
        "sampling": {"max_tokens": MAX_TOKENS},
        "algorithm": {"preset": "grpo", "max_staleness": max_staleness, "group_size": GROUP_SIZE},
        "learner": {
            "num_steps": NUM_STEPS, "groups_per_step": 1, "lr": 1e-7, "num_threads": 1,
            "compute_dtype": "float32", "micro_batch_tokens": 1024, "effective_mu_every_steps": 0,
            "checkpoint_every_steps": NUM_STEPS,
        },
        "eval": {"every_steps": 0},
    }  # fmt: skip
    for section, values in sections.items():
        own.setdefault(section, {}).update(values)
    config = write_config(home, MODEL.resolve(), **own)
    command = [sys.executable, "-m", "common.local", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S, check=False, env={**os.environ})
    if done.returncode:
        raise RuntimeError(f"chord-local ended with {done.returncode}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return read_turns(home / "run" / "metrics.jsonl", max_staleness)


def read_turns(metrics: Path, max_staleness: int) -> Turns:
    lines = read_lines(metrics)[NUM_WARM_STEPS:]
    served_s = sum(line["actor_served_s"] for line in lines)
    return Turns(
        max_staleness,
        [line["step_s"] for line in lines],
        [line["wait_s"] for line in lines],
        statistics.fmean(line["trained_sampling_s_mean"] for line in lines),
        sum(line["actor_idle_s"] for line in lines) / served_s if served_s else 0.0,
        max(line["staleness_max"] for line in lines),
    )
