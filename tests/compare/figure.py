"""The figure: what the tables say, to look at. Written as SVG, with the same bytes for the same results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tests.compare.outcome import by_seed
from tests.compare.plan import METHODS, START, PlannedRun
from tests.compare.results import Result
from tests.compare.scale import Scale

COLOURS = {START: "#7f7f7f"} | dict(
    zip(METHODS, ("#4477aa", "#ccbb44", "#66ccee", "#aa3377", "#ee6677", "#228833"), strict=True)
)
"""Told apart by readers who see no red or green too (Paul Tol's bright scheme)."""
STYLE = {"svg.hashsalt": "chord", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def draw(
    path: Path, scale: Scale, runs: Sequence[PlannedRun], results: Mapping[str, Result], outcome: Mapping[str, Any]
) -> None:
    """Curves, accuracy with retention, entropy, and the effect of lag; a panel without results says so."""
    with plt.rc_context(STYLE):
        figure, ((curves, ends), (entropy, lags)) = plt.subplots(2, 2, figsize=(10.5, 7.5), layout="constrained")
        _curves(curves, scale, runs, results)
        _ends(ends, outcome["methods"])
        _entropy(entropy, outcome["methods"])
        _lags(lags, outcome["staleness"], bar=outcome["bar"]["reward"])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
        plt.close(figure)


def _curves(axes: Axes, scale: Scale, runs: Sequence[PlannedRun], results: Mapping[str, Result]) -> None:
    """Each seed thin, their mean bold."""
    axes.set_title("held-out accuracy while training (greedy, validation problems)")
    for method in METHODS:
        found = [result for result in by_seed(scale, runs, results, method).values() if not result.failure]
        for result in found:
            axes.plot(*_points(result), color=COLOURS[method], linewidth=0.7, alpha=0.45)
        if steps := sorted(set.intersection(*(set(result.validation["step"]) for result in found)) if found else ()):
            lines = [dict(zip(*_points(result), strict=True)) for result in found]
            means = [fmean(line[step] for line in lines) for step in steps]
            axes.plot(steps, means, color=COLOURS[method], linewidth=2, label=method)
    axes.set_xlabel("optimizer step")
    _legend(axes)


def _points(result: Result) -> tuple[list[float], list[float]]:
    return result.validation["step"], result.validation["accuracy"]


def _ends(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """Up is better at the task, right is better at what was not trained on."""
    axes.set_title("held-out accuracy against retention (90 % intervals)")
    for row in rows:
        if row["accuracy"] and row["retention"]:
            axes.errorbar(
                row["retention"]["mean"], row["accuracy"]["mean"], xerr=row["retention"]["half_width"],
                yerr=row["accuracy"]["half_width"], fmt="o", color=COLOURS[row["label"]],
                label="untrained" if row["label"] == START else row["label"], capsize=2, linewidth=1,
            )  # fmt: skip
    axes.set_xlabel("accuracy on families that were not trained on")
    _legend(axes)


def _entropy(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("entropy of the trained policy (90 % intervals)")
    shown = [row for row in rows if row["entropy"]]
    for place, row in enumerate(shown):
        axes.bar(
            place, row["entropy"]["mean"], yerr=row["entropy"]["half_width"], color=COLOURS[row["label"]], capsize=3,
        )  # fmt: skip
    names = ["untrained" if row["label"] == START else row["label"] for row in shown]
    axes.set_xticks(range(len(shown)), names, rotation=20)
    axes.set_ylabel("nats per token")
    _say_if_empty(axes, shown)


def _lags(axes: Axes, rows: Sequence[Mapping[str, Any]], *, bar: float) -> None:
    axes.set_title("reward with old weights − without lag (90 % intervals; hollow: one seed)")
    axes.axhspan(-bar, bar, color="#dddddd", zorder=0)
    shown = [row for row in rows if row["against"]]
    for correction, colour, shift in (("tis", "#228833", -0.1), ("none", "#ee6677", 0.1)):
        name = "corrected (tis)" if correction == "tis" else "not corrected"
        for row in [row for row in shown if row["correction"] == correction]:
            difference = row["against"]
            axes.errorbar(
                row["lag"] + shift, difference["mean"], yerr=difference["half_width"], fmt="o", color=colour, capsize=3,
                label=name, markerfacecolor=colour if difference["over"] == "seeds" else "white",
            )  # fmt: skip
            name = "_"  # in the legend once
    axes.set_xlabel("optimizer steps that the weights of the actor lag")
    _legend(axes)


def _legend(axes: Axes) -> None:
    handles, _ = axes.get_legend_handles_labels()
    if handles:
        axes.legend(fontsize=8, frameon=False)
    _say_if_empty(axes, handles)


def _say_if_empty(axes: Axes, shown: Sequence[Any]) -> None:
    if not shown:
        axes.text(0.5, 0.5, "no results yet", transform=axes.transAxes, ha="center", va="center", color="#777777")
