"""The plan: which runs there are, in which order, and each one's configuration.

1. The untrained model, for each seed. 2. Seed 0 of every method with the first learning rate of its grid, then with
the others. 3. The other seeds, a seed at a time, each method with the rate that validation chose at seed 0. 4. GRPO
with weights that lag, a seed at a time, after a few supervised steps: from a policy that has much to win by sampling,
as otherwise no lag could lose anything. So whatever time ends it, what is there is balanced.

Budgets are equal: every method takes `num_steps` optimizer steps; those with an expert half see as many expert rows,
and those with a policy half sample as many answers, over the run. `sft_then_rl` does one after the other, in half of
the steps each, so that its steps hold twice as much. Supervised policies are the best of those evaluated ("SFT-best");
the others are what the last step left.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tests.compare.results import Result
from tests.compare.scale import BAR_LAG, Scale
from tests.compare.tables import task_hash
from tests.compare.task import READING, TEMPERATURE, TRAINED

METHODS = ("sft", "grpo", "sft_then_rl", "dft", "chord_mu", "chord_phi")
SUPERVISED = ("sft", "dft")
START = "start"
LAGGED = "sft_then_rl"
"""The method of the runs whose weights lag: past its supervised steps nothing but sampled answers to learn from."""
FORM = 2
"""Raised where the harness measures something else than before, so that older results are taken anew."""
Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class PlannedRun:
    """One run; its configuration is known once the learning rates that it needs have been chosen."""

    part: str
    """methods or staleness."""
    label: str
    """The method, or how stale and with which correction: "tis lag 4"."""
    seed: int
    lr: float | None
    """The peak learning rate; None while it is not chosen, or where nothing is trained."""
    sections: Sections | None
    """The configuration; None while a learning rate is not chosen."""
    lag: int | None = None
    """Optimizer steps that the actor's weights lag; None: a plain actor."""
    settings: Mapping[str, Any] | None = None
    """What else the result depends on."""

    @property
    def name(self) -> str:
        """Of its files. Runs of a method with other learning rates have other names."""
        rate = f"-lr{self.lr:g}" if self.part == "methods" and self.lr else ""
        return f"{self.part}-{self.label.replace(' ', '-')}{rate}-seed{self.seed}"

    @property
    def is_ready(self) -> bool:
        return self.sections is not None

    @property
    def num_steps(self) -> int:
        """Optimizer steps. Only of a run that is ready."""
        return self.sections["learner"]["num_steps"] if self.sections else 0

    @property
    def is_trained(self) -> bool:
        return self.label != START

    @property
    def settings_hash(self) -> str:
        """Equal exactly where a run would be taken and measured in the same way."""
        whole = {"form": FORM, "sections": self.sections, "lag": self.lag, "settings": self.settings}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]


def make_plan(scale: Scale, results: Mapping[str, Result]) -> list[PlannedRun]:
    """Every run, in the order in which they are taken. `results` by name choose the learning rates."""
    runs = [_start(scale, seed) for seed in scale.seeds]
    first = scale.seeds[0]
    tried: dict[str, list[PlannedRun]] = {method: [] for method in METHODS}
    for method in ("sft", *(method for method in METHODS if method != "sft")):
        sft_lr = chosen_rate(tried["sft"], results) if method == "sft_then_rl" else None
        for lr in scale.rates[method]:
            tried[method].append(method_run(scale, method, first, lr, sft_lr=sft_lr))
    runs += _in_rounds(tried)
    rates = {method: chosen_rate(tried[method], results) for method in METHODS}
    for seed in scale.seeds[1:]:
        runs += [method_run(scale, method, seed, rates[method], sft_lr=rates["sft"]) for method in METHODS]
    return runs + list(_staleness(scale, rates[LAGGED], sft_lr=rates["sft"]))


def chosen_rate(tried: list[PlannedRun], results: Mapping[str, Result]) -> float | None:
    """That of the best validation accuracy, the smaller of equals; None until all have been tried."""
    best = best_so_far(tried, results)
    return best.lr if best and all(fresh(run, results) for run in tried) else None


def best_so_far(runs: list[PlannedRun], results: Mapping[str, Result]) -> Result | None:
    """Of one method's finished runs at one seed, the one whose rate validation prefers."""
    found = sorted((result for run in runs if (result := fresh(run, results))), key=lambda result: result.lr or 0)
    return max(found, key=lambda result: result.validation_accuracy, default=None)


def fresh(run: PlannedRun, results: Mapping[str, Result]) -> Result | None:
    """The run's result, where there is one of the same settings."""
    result = results.get(run.name) if run.is_ready else None
    return result if result and result.settings_hash == run.settings_hash else None


def _in_rounds(tried: Mapping[str, list[PlannedRun]]) -> list[PlannedRun]:
    """The first rate of every method, then the others; all of sft's before sft_then_rl, which waits for its choice."""
    others = [method for method in METHODS if method not in ("sft", "sft_then_rl")]
    further = range(1, len(tried["sft"]))
    order = [("sft", 0), *((method, 0) for method in others), *(("sft", i) for i in further), ("sft_then_rl", 0)]
    order += [(method, i) for i in further for method in METHODS if method != "sft"]
    return [tried[method][i] for method, i in order]


def _start(scale: Scale, seed: int) -> PlannedRun:
    return PlannedRun("methods", START, seed, None, _base(scale, seed), settings=_settings(scale))


def method_run(scale: Scale, method: str, seed: int, lr: float | None, *, sft_lr: float | None) -> PlannedRun:
    """A run of the comparison of methods; without a configuration where a rate is missing."""
    run = PlannedRun("methods", method, seed, lr, None, settings=_settings(scale))
    if lr is None or (method == "sft_then_rl" and sft_lr is None):
        return run
    sections = _base(scale, seed)
    sections["algorithm"] |= {"preset": method, "max_staleness": 1}
    sections["learner"]["lr"] = lr
    if method in SUPERVISED:  # all steps are supervised ones, and the best evaluated policy is kept
        sections["algorithm"] |= {"sft_steps": scale.num_steps, "sft_ends_with": "best"}
    if method == "sft_then_rl":
        sections["algorithm"] |= {"sft_steps": scale.num_steps // 2, "sft_ends_with": "best"}
        sections["learner"] |= {"lr": sft_lr, "lr_after_sft": lr, "groups_per_step": 2 * scale.groups_per_step}
        sections["expert"]["rows_per_step"] *= 2
    if method == "chord_mu":  # the paper's schedule for tools falls over the first fifth of the run
        sections["algorithm"]["mu_decay_steps"] = scale.num_steps // 5
    return PlannedRun("methods", method, seed, lr, sections, settings=_settings(scale))


def _staleness(scale: Scale, lr: float | None, *, sft_lr: float | None) -> Iterator[PlannedRun]:
    for seed in (*scale.lag_seeds, *scale.more_lag_seeds):
        for lag in scale.lags:
            for correction in ("tis", "none") if lag else ("tis",):
                is_on_the_bar = correction == "tis" and lag <= BAR_LAG
                if seed in scale.lag_seeds or is_on_the_bar:
                    yield lagged_run(scale, seed, lag, correction, lr, sft_lr=sft_lr)


def lagged_run(
    scale: Scale, seed: int, lag: int, correction: str, lr: float | None, *, sft_lr: float | None
) -> PlannedRun:
    """A run whose actor serves weights that are `lag` optimizer steps old, once the supervised steps are taken."""
    label, settings = f"{correction} lag {lag}", _settings(scale, has_retention=False)
    if lr is None or sft_lr is None:
        return PlannedRun("staleness", label, seed, None, None, lag, settings)
    sections, num_steps = _base(scale, seed), scale.lag_sft_steps + scale.num_steps
    sections["run"]["num_actors"] = 0  # the harness starts the one that lags
    sections["algorithm"] |= {
        "preset": LAGGED, "sft_steps": scale.lag_sft_steps, "correction": correction, "max_staleness": lag,
        "allow_uncorrected": correction == "none",
    }  # fmt: skip
    sections["learner"] |= {
        "lr": sft_lr,
        "lr_after_sft": lr,
        "num_steps": num_steps,
        "checkpoint_every_steps": num_steps,
    }
    return PlannedRun("staleness", label, seed, lr, sections, lag, settings)


def _base(scale: Scale, seed: int) -> Sections:
    """What all runs have in common."""
    return {
        "run": {"seed": seed, "num_actors": 1},
        "model": {"path": str(scale.model)},
        "environment": {"name": "math", "options": dict(READING)},
        "sampling": {"max_tokens": TRAINED.max_tokens, "temperature": TEMPERATURE},
        "algorithm": {"group_size": scale.group_size},
        "actor": {
            "engine": scale.engine, "dtype": scale.dtype, "max_model_tokens": scale.max_model_tokens,
            "num_threads": scale.num_threads, "gpu_memory_frac": 0.2,
        },
        "learner": {
            "num_steps": scale.num_steps, "groups_per_step": scale.groups_per_step, "lr_warmup_steps": 2,
            "lr_schedule": "linear", "num_threads": scale.num_threads, "compute_dtype": scale.dtype,
            "micro_batch_tokens": 1024, "checkpoint_every_steps": scale.num_steps, "keep_checkpoints": 1,
            "effective_mu_every_steps": 0,
        },
        "network": {"port": 0},
        "expert": {"rows_per_step": scale.rows_per_step},
        "eval": {"every_steps": scale.eval_every_steps, "num_problems": scale.num_validation_problems},
    }  # fmt: skip


def _settings(scale: Scale, *, has_retention: bool = True) -> dict[str, Any]:
    """What a result depends on beside the run's configuration."""
    retention = {
        "num_problems": scale.num_retention_problems, "families": [asdict(family) for family in scale.families]
    }  # fmt: skip
    return {
        "demonstrations": task_hash(scale.num_expert_rows),
        "test": {"num_problems": scale.num_test_problems, "k": scale.num_test_answers, "temperature": TEMPERATURE},
        "retention": retention if has_retention else None,
        "num_entropy_answers": scale.num_entropy_answers,
    }
