"""The outcome: compare.json, made anew from whatever results there are, and saying how far they go."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from tests.compare.intervals import Interval, over_seeds, paired_over_problems, paired_over_seeds
from tests.compare.plan import METHODS, START, PlannedRun, best_so_far, fresh
from tests.compare.results import Result
from tests.compare.scale import BAR, BAR_LAG, Scale

Row = dict[str, Any]
AGAINST = ("sft", "grpo", "sft_then_rl")
"""Whom the methods' accuracies are compared with, seed by seed: what one would do without CHORD."""
MIN_SEEDS = 3
"""Fewer give no verdict on the bar."""


def describe(scale: Scale, runs: Sequence[PlannedRun], results: Mapping[str, Result]) -> dict[str, Any]:
    """The whole document."""
    done = [result for run in runs if (result := fresh(run, results))]
    return {
        "num_runs": len(runs),
        "num_done": len(done),
        "failed": {result.name: result.failure for result in done if result.failure},
        "failed_once": {
            result.name: result.earlier_failure for result in done if result.earlier_failure and not result.failure
        },
        "missing": [run.name for run in runs if not fresh(run, results)],
        "methods": describe_methods(scale, runs, results),
        "staleness": describe_staleness(scale, runs, results),
        "bar": {"reward": BAR, "lag": BAR_LAG},
        "hours": sum(sum(result.wall_s.values()) for result in done) / 3600,
        "machines": sorted({machine for result in done if (machine := _machine(result))}),
        "commits": sorted({commit for result in done if (commit := result.provenance.get("commit"))}),
    }  # fmt: skip


def describe_methods(scale: Scale, runs: Sequence[PlannedRun], results: Mapping[str, Result]) -> list[Row]:
    """A row for each method with a finished run, the untrained model first."""
    kept = {label: by_seed(scale, runs, results, label) for label in (START, *METHODS)}
    rows: list[Row] = []
    for label, found in kept.items():
        tried = [run for run in runs if run.part == "methods" and run.label == label]
        good = {seed: result for seed, result in found.items() if not result.failure}
        if not any(fresh(run, results) for run in tried):
            continue
        rows.append(
            {
                "label": label,
                "num_seeds": len(good),
                "failed_seeds": sorted(found.keys() - good.keys()),
                "lr": sorted({result.lr for result in good.values() if result.lr}),
                "tries": describe_tries([run for run in tried if run.seed == scale.seeds[0]], results),
                "accuracy": _over(good, lambda result: result.test.accuracy if result.test else None),
                "validation": _over(good, lambda result: result.validation_accuracy if result.curves else None),
                "retention": _over(good, lambda result: result.retention_accuracy),
                "retention_by_family": {
                    family: _over(good, lambda result, family=family: result.retention[family].accuracy)
                    for family in next(iter(good.values())).retention
                }
                if good
                else {},
                "answer_tokens": _over(good, lambda result: result.test.answer_tokens if result.test else None),
                "entropy": _over(good, lambda result: result.entropy),
                "against": {other: _difference(good, kept[other]) for other in AGAINST if other != label},
                "budget": _means([result.budget for result in good.values()]),
                "wall_s": _means([result.wall_s for result in good.values()]),
            }
        )
    return rows


def describe_tries(runs: Sequence[PlannedRun], results: Mapping[str, Result]) -> list[Row]:
    """What each learning rate of a method gave at the seed that chose among them, lowest first."""
    best = best_so_far(list(runs), results)
    found = [result for run in runs if (result := fresh(run, results)) and result.lr]
    return [
        {
            "lr": result.lr,
            "failure": result.failure,
            "validation": None if result.failure else result.validation_accuracy,
            "accuracy": result.test.accuracy if result.test else None,
            "retention": result.retention_accuracy,
            "is_best": result is best,
        }
        for result in sorted(found, key=lambda result: result.lr or 0)
    ]


def describe_staleness(scale: Scale, runs: Sequence[PlannedRun], results: Mapping[str, Result]) -> list[Row]:
    """A row for each lag and correction with a finished run; the first of the plan has no lag."""
    labels = list(dict.fromkeys((run.label, run.lag) for run in runs if run.part == "staleness"))
    found = {
        label: {
            run.seed: result
            for run in runs
            if run.part == "staleness" and run.label == label and (result := fresh(run, results))
        }
        for label, _ in labels
    }
    rows: list[Row] = []
    for label, lag in labels:
        good = {seed: result for seed, result in found[label].items() if not result.failure}
        if not found[label]:
            continue
        without_lag = found[labels[0][0]]
        difference = None if lag == 0 else _difference(good, without_lag, of=_reward)
        is_barred = bool(lag) and lag <= BAR_LAG and not label.startswith("none")
        has_failed = any(result.failure for result in (*found[label].values(), *without_lag.values()))
        rows.append(
            {
                "label": label,
                "lag": lag,
                "correction": label.split()[0],
                "num_seeds": len(good),
                "failed_seeds": sorted(found[label].keys() - good.keys()),
                "staleness_mean": _over(good, lambda result: _mean_of(_sampled(scale, result, "staleness_mean"))),
                "staleness_max": max(
                    (most for result in good.values() for most in _sampled(scale, result, "staleness_max") if most),
                    default=0,
                ),
                "gain": _over(good, lambda result: _gain(scale, result)),
                "reward": _over(good, _reward),
                "entropy": _over(good, lambda result: result.entropy),
                "against": difference,
                "is_within_bar": _verdict(difference) if is_barred and not has_failed else None,
                "wall_s": _means([result.wall_s for result in good.values()]),
            }
        )
    return rows


def by_seed(scale: Scale, runs: Sequence[PlannedRun], results: Mapping[str, Result], label: str) -> dict[int, Result]:
    """Of each seed the method's result; where several learning rates were tried, that of the best by validation."""
    found: dict[int, Result] = {}
    for seed in scale.seeds:
        tried = [run for run in runs if (run.part, run.label, run.seed) == ("methods", label, seed)]
        if best := best_so_far(tried, results):
            found[seed] = best
    return found


def _machine(result: Result) -> str:
    return "{processor}, {cores} cores".format(**result.provenance) if result.provenance else ""


def _reward(result: Result) -> float | None:
    return result.test.reward if result.test else None


def _verdict(difference: Row | None) -> bool | None:
    """Whether the interval over seeds lies within the bar; None where there are too few of them."""
    if difference is None or difference["over"] != "seeds" or difference["num"] < MIN_SEEDS:
        return None
    return Interval(difference["mean"], difference["half_width"], difference["num"]).lies_within(BAR)


def _over(results: Mapping[int, Result], value: Callable[[Result], float | None]) -> Row | None:
    """Mean and interval, with the values by seed."""
    found = {seed: number for seed, result in results.items() if (number := value(result)) is not None}
    return asdict(over_seeds(list(found.values()))) | {"values": found} if found else None


def _difference(
    ours: Mapping[int, Result], others: Mapping[int, Result], *,
    of: Callable[[Result], float | None] = lambda result: result.test.accuracy if result.test else None,
) -> Row | None:  # fmt: skip
    """Of ours − the others', over seeds; where they share but one, over its problems (of accuracies)."""
    a, b = ({seed: value for seed, r in side.items() if (value := of(r)) is not None} for side in (ours, others))
    found = paired_over_seeds(a, b)
    if found is None:
        return None
    if found.num > 1:
        return asdict(found) | {"over": "seeds"}
    (seed,) = a.keys() & b.keys()
    mine, its = ours[seed].test, others[seed].test
    assert mine
    assert its
    return asdict(paired_over_problems(mine.by_problem, its.by_problem)) | {"over": "problems"}


def _means(counts: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    return {key: fmean(count[key] for count in counts) for key in counts[0]} if counts else {}


def _sampled(scale: Scale, result: Result, curve: str) -> Sequence[float | None]:
    """A curve past the supervised steps."""
    return result.curves.get(curve, [])[scale.lag_sft_steps :]


def _gain(scale: Scale, result: Result) -> float | None:
    """Validation accuracy at the end − that at the end of the supervised steps: what sampling has won."""
    found = dict(zip(result.validation["step"], result.validation["accuracy"], strict=True))
    before, after = found.get(scale.lag_sft_steps), found.get(result.kept_step)
    return None if before is None or after is None else after - before


def _mean_of(values: Sequence[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return fmean(found) if found else None
