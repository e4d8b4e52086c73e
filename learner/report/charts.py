"""The charts of a report: which lines and bars there are, of which fields, and what they say.

A line is drawn for each run and each field, through at most MAX_POINTS points: of a longer run, each is a mean over
neighbouring steps, and of a largest value the largest.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from learner.report.run import Run

MAX_POINTS = 1000
NUM_BINS = 24
"""Of a histogram of lengths."""
Reducer = Callable[[NDArray[np.float64]], Any]
_S_PER_H = 3600.0


@dataclass(frozen=True)
class Lines:
    """A chart of fields of metrics.jsonl over the optimizer steps."""

    title: str
    fields: Mapping[str, str]
    """Field → its name in the legend."""
    note: str = ""
    is_counter: bool = False
    """Its fields count from the learner's start; shown is what each step added."""


@dataclass
class Chart:
    """What the page draws."""

    title: str
    note: str
    kind: str
    """`lines` over steps or time, `bars` and `stairs` over what `x` says."""
    x: str
    series: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


ACCURACY = "Held-out accuracy"

REWARD = Lines("Reward", {"reward_mean": "reward"}, "mean of the trajectories trained on")
LEARNING = (
    Lines("Losses", {"policy_loss": "policy half", "expert_loss": "expert half"}),
    Lines(
        "μ", {"mu": "μ", "mu_effective": "effective μ"},
        "effective: the expert half's share of the gradient, where it was measured",
    ),
    Lines("φ", {"expert_phi_mean": "φ"}, "mean weight of the expert tokens: φ = p(1 − p), of dft p, of others 1"),
    Lines(
        "Expert tokens decided", {"expert_p_lt_01_frac": "p < 0.1", "expert_p_gt_09_frac": "p > 0.9"},
        "shares of expert tokens of which little is learned with φ",
    ),
    Lines("−log p of expert tokens", {"expert_nll_mean": "−log p"}, "nats, mean"),
    Lines("Policy entropy", {"policy_entropy": "entropy"}, "nats, mean over policy tokens"),
    Lines("Mismatch KL", {"policy_mismatch_kl": "KL"}, "from the behaviour policy to the policy, k3 estimate"),
    Lines(
        "Importance correction",
        {
            "policy_ess_frac": "effective sample size", "policy_clip_frac": "clipped", "policy_cap_frac": "truncated",
            "policy_masked_frac": "rejected",
        },
        "shares of policy tokens",
    ),
    Lines(
        "Groups and answers",
        {"groups_with_signal_frac": "groups with signal", "truncated_frac": "answers cut off"}, "shares",
    ),
    Lines("Gradient norm", {"grad_norm": "norm"}, "before clipping"),
)  # fmt: skip
STALENESS = Lines("Staleness", {"staleness_mean": "mean", "staleness_max": "largest"}, "optimizer steps")
LENGTH = Lines(
    "Answer length", {"sampled_answer_tokens_mean": "sampled", "trained_answer_tokens_mean": "trained"},
    "tokens, over the last 64 steps; a gap is a bias",
)  # fmt: skip
SPEED = (
    Lines(
        "Who waited for whom", {"learner_wait_frac": "learner waited", "actor_idle_frac": "actors idle"},
        "shares of their time",
    ),
    Lines("Tokens per second", {"actor_tokens_per_s": "sampled", "learner_tokens_per_s": "trained"}),
    Lines("Seconds of a step", {"wait_s": "waiting for groups", "train_s": "training", "publish_s": "publishing"}),
    Lines("Weight bytes", {"weight_bytes_sent": "sent"}, "a step, to all actors together", is_counter=True),
    Lines("Trajectory bytes", {"trajectory_bytes_received": "received"}, "a step", is_counter=True),
)  # fmt: skip


def make_charts(runs: Sequence[Run]) -> list[Chart]:
    """All charts that have something to show, in the order that people ask."""
    charts = [
        _lines(REWARD, runs), *_accuracies(runs), *(_lines(one, runs) for one in LEARNING), _lines(STALENESS, runs),
        _staleness(runs), _lines(LENGTH, runs), _lengths(runs), *(_lines(one, runs) for one in SPEED),
    ]  # fmt: skip
    return [chart for chart in charts if chart.series]


def _lines(wanted: Lines, runs: Sequence[Run]) -> Chart:
    chart = Chart(wanted.title, wanted.note, "lines", "optimizer step")
    for r, run in enumerate(runs):
        for name, label in wanted.fields.items():
            values = _column(run.lines, name)
            if wanted.is_counter:
                values = _added(values)
            if np.isfinite(values).any():
                of_part = np.max if name.endswith("_max") else np.mean
                chart.series.append({"run": r, "label": label, **_thinned(run, values, of_part)})
    return chart


def _column(lines: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
    """NaN where a line has no number of this name."""
    return np.array([value if (value := line.get(name)) is not None else np.nan for line in lines], dtype=np.float64)


def _added(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each step added to a count that begins anew with the learner."""
    added = np.diff(counts, prepend=0.0)
    return np.where(added < 0, counts, added)


def _thinned(run: Run, values: NDArray[np.float64], of_part: Reducer) -> dict[str, list[float | None]]:
    steps, hours = _column(run.lines, "step"), _column(run.lines, "run_wall_s") / _S_PER_H
    parts = np.array_split(np.arange(len(values)), min(len(values), MAX_POINTS))
    columns = {"x": (steps, np.max), "t": (hours, np.max), "y": (values, of_part)}
    return {name: [_reduce(column[part], by) for part in parts] for name, (column, by) in columns.items()}


def _reduce(values: NDArray[np.float64], by: Reducer) -> float | None:
    finite = values[np.isfinite(values)]
    return float(f"{by(finite):.6g}") if len(finite) else None


def _accuracies(runs: Sequence[Run]) -> Iterator[Chart]:
    """One chart for each task."""
    tasks = dict.fromkeys(line["task"] for run in runs for line in run.evaluations)
    for task in tasks:
        note = f"{task}, with 95 % intervals" if len(tasks) == 1 else "with 95 % intervals"
        title = ACCURACY if len(tasks) == 1 else f"{ACCURACY}: {task}"
        chart = Chart(title, note, "lines", "optimizer step")
        for r, run in enumerate(runs):
            if found := [line for line in run.evaluations if line["task"] == task]:
                low, high = zip(*map(_interval, found), strict=True)
                steps = [line["step"] for line in found]
                accuracies = [line["accuracy"] for line in found]
                bounds = {"low": low, "high": high}
                chart.series.append(
                    {"run": r, "label": "accuracy", "x": steps, "t": _hours_of(run, steps), "y": accuracies, **bounds}
                )
        yield chart


def _interval(line: Mapping[str, Any]) -> tuple[float, float]:
    """Lines of older runs have none: then that of Wilson's score."""
    if line.get("confidence_95"):
        low, high = line["confidence_95"]
        return low, high
    n, p, z = line["num_problems"], line["accuracy"], 1.96
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def _hours_of(run: Run, steps: Sequence[int]) -> list[float]:
    """When each version was there."""
    hours = {line["step"]: line.get("run_wall_s", 0.0) / _S_PER_H for line in run.lines}
    return [hours.get(step, 0.0) for step in steps]


def _staleness(runs: Sequence[Run]) -> Chart:
    """Where groups came too late, those that came stand beside those that were trained on."""
    chart = Chart("Staleness of groups", "shares of groups", "bars", "optimizer steps")
    for r, run in enumerate(runs):
        counts: Counter[int] = Counter()
        for line in run.lines:
            counts.update({int(lag): count for lag, count in line.get("staleness_histogram", {}).items()})
        bound = run.setting("algorithm", "max_staleness")
        if run.num_too_old and bound is not None:
            label = f"sampled, at {bound + 1} all that were dropped as too old"
            chart.series.append(_shares(r, label, counts + Counter({bound + 1: run.num_too_old})))
        if counts:
            chart.series.append(_shares(r, "trained", counts))
    return chart


def _shares(run: int, label: str, counts: Counter[int]) -> dict[str, Any]:
    lags = list(range(max(counts) + 1))
    return {"run": run, "label": label, "x": lags, "y": [counts[lag] / counts.total() for lag in lags]}


def _lengths(runs: Sequence[Run]) -> Chart:
    chart = Chart(
        "Answer lengths, sampled against trained", "share of groups, by the mean of a group's answers", "stairs",
        "tokens",
    )  # fmt: skip
    longest = max((length for run in runs for length, _ in run.answer_lengths), default=0.0)
    edges = np.linspace(0, longest, NUM_BINS + 1)
    for r, run in enumerate(runs):
        for label, lengths in (
            ("sampled", [length for length, _ in run.answer_lengths]),
            ("trained", [length for length, is_trained in run.answer_lengths if is_trained]),
        ):
            if lengths:
                shares = np.histogram(lengths, edges)[0] / len(lengths)
                chart.series.append({"run": r, "label": label, "x": edges.tolist(), "y": shares.tolist()})
    return chart
