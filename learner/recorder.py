"""The recorder: metrics.jsonl, eval.jsonl and summary.json of a run. No step and no evaluation ever appears twice."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.trajectory import TrajectoryGroup
from learner.ledger.account import Account
from learner.ledger.ledger import Ledger
from learner.metrics import LearnerMetrics


def describe_groups(
    groups: Sequence[TrajectoryGroup], *, step: int, actor_ids: Sequence[str], with_signal: int
) -> dict[str, Any]:
    """The part of a step record that tells of its groups; None where the step had none."""
    trajectories = [trajectory for group in groups for trajectory in group.trajectories]
    lags = [step - group.min_version for group in groups]
    return {
        "num_groups": len(groups),
        "num_trajectories": len(trajectories),
        "num_groups_with_signal": with_signal,
        "groups_with_signal_frac": with_signal / len(groups) if groups else None,
        "reward_mean": _mean([t.reward for t in trajectories]),
        "answer_tokens_mean": _mean([t.num_answer_tokens for t in trajectories]),
        "truncated_frac": _mean([float(t.is_truncated) for t in trajectories]),
        "staleness_mean": _mean(lags),
        "staleness_max": max(lags, default=None),
        "staleness_histogram": {str(lag): count for lag, count in sorted(Counter(lags).items())},
        "groups_by_actor": dict(sorted(Counter(actor_ids).items())),
    }


def describe_bias(account: Account, *, last: int) -> dict[str, Any]:
    """The part of a step record that sets what was sampled against what was trained, over the `last` groups leased."""
    return {
        f"{name}_{field}_mean": getattr(found, field)
        for name, found in (("sampled", account.sampled(last)), ("trained", account.trained(last)))
        for field in ("answer_tokens", "reward", "sampling_s")
    }


def describe_tasks(evaluations: Sequence[Mapping[str, Any]], *, num_steps: int) -> dict[str, dict[str, float | None]]:
    """By task, in the order of the configuration: accuracy of the first and of the last version, None where missing."""
    found: dict[str, dict[str, float | None]] = {line["task"]: {"before": None, "after": None} for line in evaluations}
    for line in evaluations:
        if line["step"] in (0, num_steps):
            found[line["task"]]["before" if line["step"] == 0 else "after"] = line["accuracy"]
    return found


class Recorder:
    """Writes what a run leaves to be read."""

    def __init__(self, run_dir: Path, ledger: Ledger) -> None:
        self._run_dir = run_dir
        self._ledger = ledger
        self._metrics_path = run_dir / "metrics.jsonl"
        self._eval_path = run_dir / "eval.jsonl"
        self.prometheus = LearnerMetrics()
        self._started = time.monotonic()
        self._earlier_s = 0.0

    def restore(self) -> None:
        """Write metrics.jsonl and eval.jsonl anew from the ledger, whatever a crash or a bad disk did to them."""
        records = self._ledger.account.records()
        if records:
            self._earlier_s = records[-1]["run_wall_s"]
            self.prometheus.restore(records[-1])
        _write_lines(self._metrics_path, records)
        _write_lines(self._eval_path, self._ledger.account.evaluations())

    def add_step(self, record: dict[str, Any]) -> None:
        """The step is taken: note it in the ledger with its record, whose `step` counts completed steps.

        The record of a step that is replayed stays the first one.
        """
        line = {**record, "time": time.time(), "run_wall_s": self.run_wall_s}
        if self._ledger.finish_batch(line["step"] - 1, json.dumps(line)):
            _append_lines(self._metrics_path, [line])
            self.prometheus.observe(line)

    def add_evaluation(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """One version's scores, a line for each task."""
        _append_lines(self._eval_path, lines)

    @property
    def run_wall_s(self) -> float:
        """Time that the run has taken, over all starts of its learner."""
        return self._earlier_s + time.monotonic() - self._started

    def write_summary(self, *, num_steps: int) -> dict[str, Any]:
        """summary.json, from the ledger and the lines above."""
        account = self._ledger.account
        lines = account.records()
        tasks = describe_tasks(account.evaluations(), num_steps=num_steps)
        first = next(iter(tasks.values()), {"before": None, "after": None})
        num_groups = sum(line["num_groups"] for line in lines)
        counts = account.counts()
        summary = {
            "run_id": self._ledger.run_id,
            "steps": lines[-1]["step"] if lines else 0,
            "num_steps": num_steps,
            "eval_before": first["before"],
            "eval_after": first["after"],
            "eval_tasks": tasks,
            "trajectories_trained": account.num_trained_trajectories(),
            "groups_trained": counts.trained,
            "groups_dropped": account.dropped(),
            "groups_with_signal_frac": sum(line["num_groups_with_signal"] for line in lines) / num_groups
            if num_groups
            else None,
            "groups_by_actor": dict(sum((Counter(line["groups_by_actor"]) for line in lines), Counter[str]())),
            "max_staleness_trained": account.max_trained_staleness(),
            "duplicates": account.num_duplicates(),
            "lost": account.num_lost(),
            "redelivered": account.num_redelivered(),
            "incarnations": self._ledger.incarnation,
            "reward_first": lines[0]["reward_mean"] if lines else None,
            "reward_last": lines[-1]["reward_mean"] if lines else None,
            "learner_wait_frac": _share(lines, "wait_s", of="step_s"),
            "actor_idle_frac": _share(lines, "actor_idle_s", of="actor_served_s"),
            "wall_s": self.run_wall_s,
        }
        path = self._run_dir / "summary.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(summary, indent=2) + "\n")
        partial.replace(path)
        return summary


def _share(lines: Sequence[Mapping[str, Any]], part: str, *, of: str) -> float | None:
    """Of the whole run; None where there is nothing to have a share of."""
    whole = sum(line.get(of, 0.0) for line in lines)
    return sum(line.get(part, 0.0) for line in lines) / whole if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _append_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    with path.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial.replace(path)
