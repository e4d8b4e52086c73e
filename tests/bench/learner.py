"""The learner's step against TRL's GRPO loss and backward, and against the loss that one would write with transformers.

Each side lives in a process of its own, with the same weights, rows, threads and dtype; their steps alternate, so that
a slow moment of the machine hits all alike. A step is forward, loss and backward of one group: gradients are added up,
no optimizer runs.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.bench.contender import Contender
from tests.bench.figure import Bar, Figure
from tests.bench.group import Shape
from tests.bench.products import seconds_of_products

MODEL = Path("models/smollm2-135m")
SHAPES = {Shape(256, 64): Bar(at_least=2.4), Shape(128, 128): Bar(at_least=1.25), Shape(40, 16): Bar(at_least=1.6)}
MEMORY_BARS = {Shape(256, 64): Bar(at_most=0.5)}
GRADIENT_BAR = Bar(at_most=1e-5)
ROUNDS = 3
"""Timed steps of each side; one before them is not counted."""


@dataclass(frozen=True)
class Run:
    """What one side showed at one shape."""

    seconds: list[float]
    peak_bytes: int
    """Above weights and gradients."""
    gradient: Path


def measure(say: Any) -> list[Figure]:
    figures: list[Figure] = []
    peers = {"chord": "chord-rl", "trl": f"TRL {version('trl')}", "plain": f"transformers {version('transformers')}"}
    with tempfile.TemporaryDirectory() as folder:
        for shape, bar in SHAPES.items():
            runs = compete(list(peers), shape, Path(folder), say)
            ours = runs["chord"]
            figures.append(against_limit(ours, shape))
            for name in ("trl", "plain"):
                figures += compare(ours, runs[name], shape, peers[name], bar if name == "trl" else None)
    return figures


def compete(names: Sequence[str], shape: Shape, folder: Path, say: Any) -> dict[str, Run]:
    """The sides' steps in turn."""
    contenders = {name: Contender(name, MODEL, shape, folder / f"{name}-{shape.prompt}.pt") for name in names}
    try:
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for number in range(ROUNDS + 1):
            for name, contender in contenders.items():
                took = contender.step()
                if number:
                    seconds[name].append(took)
        ends = {name: contender.end() for name, contender in contenders.items()}
    finally:
        for contender in contenders.values():
            contender.close()
    say(f"{shape}: " + ", ".join(f"{name} {statistics.median(took):.2f} s" for name, took in seconds.items()))
    return {name: Run(seconds[name], ends[name].peak_bytes, ends[name].gradient) for name in names}


def against_limit(ours: Run, shape: Shape) -> Figure:
    limit_s = seconds_of_products(MODEL, shape)
    conditions = "each product timed alone, just after"
    return Figure(
        f"{shape}: time", "s", statistics.median(ours.seconds), "limit: its matrix products", limit_s,
        conditions=conditions,
    )  # fmt: skip


def compare(ours: Run, theirs: Run, shape: Shape, peer: str, bar: Bar | None) -> list[Figure]:
    """Speed, memory and gradient of ours against a peer's."""
    fastest, slowest = min(ours.seconds), max(ours.seconds)
    conditions = (
        f"{MODEL.name} float32, K = {shape.answers}, {torch.get_num_threads()} threads, median of {ROUNDS} alternating "
        f"steps; ours {fastest:.2f} to {slowest:.2f} s, its {min(theirs.seconds):.2f} to {max(theirs.seconds):.2f} s"
    )
    speeds = [shape.num_tokens / statistics.median(run.seconds) for run in (ours, theirs)]
    is_trl = bar is not None
    return [
        Figure(f"{shape}: speed", "group tokens/s", speeds[0], peer, speeds[1], bar, conditions),
        Figure(
            f"{shape}: peak memory above weights and gradients", "MiB", ours.peak_bytes / 2**20, peer,
            theirs.peak_bytes / 2**20, MEMORY_BARS.get(shape) if is_trl else None, "high-water mark of the process",
        ),
        Figure(
            f"{shape}: largest difference of a gradient", "of the largest entry",
            difference(ours.gradient, theirs.gradient), peer, 1.0, GRADIENT_BAR, "sum over all steps",
        ),
    ]  # fmt: skip


def difference(ours: Path, theirs: Path) -> float:
    """Largest difference of two gradients, relative to the largest entry."""
    mine, its = torch.load(ours), torch.load(theirs)
    assert mine.keys() == its.keys(), json.dumps(sorted(mine.keys() ^ its.keys()))
    scale = max(float(entry.abs().max()) for entry in its.values())
    return max(float((mine[name] - its[name]).abs().max()) for name in mine) / scale


os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a side that waits must not spin on the other's cores
