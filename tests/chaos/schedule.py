"""The schedule of `make chaos`: which faults, how often, in which runs; all of it follows from the seed."""

import random
from collections import Counter
from typing import Any

COUNTS = {
    "kill_actor": 75,
    "kill_learner": 18,
    "kill_evaluator": 16,
    "kill_supervisor": 6,
    "kill_all": 5,
    "kill_at_call": 10,
    "stop_actor": 6,
    "stop_learner": 5,
    "stop_left": 5,
    "reset": 6,
    "black_hole": 6,
    "delay": 5,
    "truncate": 6,
    "loss": 6,
    "throttle": 5,
    "full_disk": 6,
    "eio": 8,
    "clock_jump": 8,
    "bit_flip": 7,
    "truncation": 7,
}
"""Faults by class at scale 1; kill_actor strikes up to three at a time."""

NUM_RUNS = 6


def variants() -> list[dict[str, dict[str, Any]]]:
    """Configurations that the runs take in turn; every one trains on both halves or on groups alone."""
    simulated = {"engine": "simulated", "tokens_per_s": 60.0, "max_groups_in_flight": 2}
    common: dict[str, dict[str, Any]] = {
        "run": {"num_actors": 2, "watchdog_s": 20.0, "max_crashes": 1000},
        "learner": {"groups_per_step": 4, "checkpoint_every_steps": 10, "num_threads": 1},
        "network": {"lease_s": 8.0, "request_timeout_s": 3.0},
        "sampling": {"max_tokens": 12},
        "eval": {"every_steps": 40, "num_problems": 8},
        "actor": simulated,
    }

    def variant(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {name: {**common.get(name, {}), **sections.get(name, {})} for name in {**common, **sections}}

    return [
        variant(),
        variant(algorithm={"staleness_policy": "drop", "max_staleness": 2}),
        variant(actor={"engine": "transformers", "max_groups_in_flight": 1, "num_threads": 1}),
        variant(algorithm={"preset": "chord_mu", "max_staleness": 0}),
        variant(algorithm={"preset": "grpo", "max_staleness": 4}, run={"num_actors": 3}),
        variant(learner={"keep_checkpoints": 3, "checkpoint_every_steps": 3}),
    ]


def deal_faults(chance: random.Random, *, scale: float, only: str) -> list[list[str]]:
    """The faults of each run, in order."""
    counts = {only: max(COUNTS[only], 3)} if only else COUNTS
    wanted = Counter({name: _scaled(chance, count * scale) for name, count in counts.items()})
    faults = list(wanted.elements())
    chance.shuffle(faults)
    num_runs = max(1, min(round(NUM_RUNS * scale), len(faults)))
    return [faults[start::num_runs] for start in range(num_runs)]


def _scaled(chance: random.Random, expected: float) -> int:
    """A whole number with this mean."""
    return int(expected) + (chance.random() < expected % 1)
