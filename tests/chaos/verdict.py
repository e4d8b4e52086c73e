"""The verdict on a finished run: chord-audit, our own SQL, and what the actors were told, held against one another."""

import json
import os
import re
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.runs import QUIET, read_lines

RANK = re.compile(r"^\[rank\d+\]: ")
ACKNOWLEDGED = re.compile(r"lease (\S+): committed")


@dataclass
class Verdict:
    """What is wrong with a run; nothing, as a rule."""

    lost: int = 0
    duplicates: int = 0
    violations: list[str] = field(default_factory=list[str])
    steps: int = 0
    num_groups_trained: int = 0
    num_groups_dropped: int = 0
    num_acknowledged: int = 0
    """Receipts that actors say they got; each was found in the ledger, or is counted as lost."""
    is_audited: bool = False
    """chord-audit has looked at the run."""

    @property
    def is_clean(self) -> bool:
        return not (self.lost or self.duplicates or self.violations)


def judge(run_dir: Path, logs: list[Path], *, config: dict[str, Any]) -> Verdict:
    """`logs`: of every actor. `config`: the sections of the run's configuration."""
    verdict = Verdict()
    with closing(sqlite3.connect(f"file:{run_dir / 'ledger.sqlite'}?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        groups = {row["group_id"]: dict(row) for row in database.execute("SELECT * FROM audit_groups")}
        batches = [dict(row) for row in database.execute("SELECT * FROM batches ORDER BY step")]
    _check_groups(verdict, groups, max_staleness=config["algorithm"]["max_staleness"])
    _check_batches(verdict, groups, batches, config=config)
    _check_lines(verdict, run_dir)
    _check_receipts(verdict, groups, logs)
    _check_summary(verdict, run_dir)
    _ask_audit(verdict, run_dir)
    return verdict


def tracebacks(logs: Iterable[Path]) -> Counter[str]:
    """Last lines of the tracebacks in these logs, numbers left out; most of them are one line that is still owed."""
    found = Counter[str]()
    for log in logs:
        is_inside = False
        for line in log.read_text(errors="replace").splitlines() if log.exists() else []:
            line = RANK.sub("", line)
            if line.startswith("Traceback (most recent call last)"):
                is_inside = True
            elif is_inside and line and not line[0].isspace():
                is_inside = False
                found[f"{log.stem}: {re.sub(r'[0-9a-f]*[0-9]+', '#', line)[:160]}"] += 1
    return found


def _check_groups(verdict: Verdict, groups: dict[int, dict[str, Any]], *, max_staleness: int) -> None:
    states = Counter(group["state"] for group in groups.values())
    verdict.num_groups_trained, verdict.num_groups_dropped = states["trained"], states["dropped"]
    if states["training"]:
        verdict.violations.append(f"{states['training']} groups are in training after the end")
    for group in groups.values():
        if group["state"] == "trained" and not 0 <= group["staleness"] <= max_staleness:
            verdict.violations.append(f"group {group['group_id']}: trained with staleness {group['staleness']}")
        if group["state"] == "dropped" and not group["reason"]:
            verdict.violations.append(f"group {group['group_id']}: dropped without a reason")


def _check_batches(
    verdict: Verdict, groups: dict[int, dict[str, Any]], batches: list[dict[str, Any]], *, config: dict[str, Any]
) -> None:
    steps = [batch["step"] for batch in batches]
    verdict.steps = len(steps)
    if steps != list(range(len(steps))):
        verdict.violations.append(f"batches: steps are not 0 to {len(steps) - 1} in a row")
    times = Counter[int]()
    for batch in batches:
        group_ids = json.loads(batch["group_ids"])
        times.update(group_ids)
        if len(group_ids) != config["learner"]["groups_per_step"]:
            verdict.violations.append(f"batch {batch['step']}: {len(group_ids)} groups")
        for group_id in group_ids:
            group = groups.get(group_id)
            if not group or group["state"] != "trained" or group["step"] != batch["step"]:
                verdict.violations.append(f"batch {batch['step']}: group {group_id} is {group}")
    verdict.duplicates += sum(count - 1 for count in times.values())
    unaccounted = {i for i, group in groups.items() if group["state"] == "trained"} - times.keys()
    if unaccounted:
        verdict.violations.append(f"groups {sorted(unaccounted)[:5]} are trained, but in no batch")


def _check_lines(verdict: Verdict, run_dir: Path) -> None:
    steps = [line["step"] for line in read_lines(run_dir / "metrics.jsonl")]
    if steps != list(range(1, verdict.steps + 1)):
        verdict.violations.append(f"metrics.jsonl: {len(steps)} lines do not tell of steps 1 to {verdict.steps}")
    evaluated = [(line["step"], line["task"]) for line in read_lines(run_dir / "eval.jsonl")]
    if len(evaluated) != len(set(evaluated)):
        verdict.violations.append("eval.jsonl: a task of a step appears twice")


def _check_receipts(verdict: Verdict, groups: dict[int, dict[str, Any]], logs: list[Path]) -> None:
    """A group whose receipt an actor has must be trained, dropped with a reason, or held, and by that very lease."""
    for log in logs:
        for lease_id in ACKNOWLEDGED.findall(log.read_text(errors="replace")) if log.exists() else []:
            verdict.num_acknowledged += 1
            group = groups.get(int(lease_id.partition(".")[0]))
            if group is None or group["state"] == "leased" or group["lease_id"] != lease_id:
                verdict.lost += 1
                verdict.violations.append(f"{log.name}: lease {lease_id} was acknowledged, the ledger has {group}")


def _check_summary(verdict: Verdict, run_dir: Path) -> None:
    summary = json.loads((run_dir / "summary.json").read_text())
    verdict.lost = max(verdict.lost, summary["lost"])
    if summary["duplicates"] > verdict.duplicates or summary["steps"] != verdict.steps:
        verdict.violations.append(f"summary.json and ledger differ: {summary}")
    if not (run_dir / "final" / "model.safetensors").exists():
        verdict.violations.append("final/model.safetensors is missing")


def _ask_audit(verdict: Verdict, run_dir: Path) -> None:
    command = [sys.executable, "-m", "learner.audit", str(run_dir), "--json"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **QUIET}
    )
    if done.returncode != 0:
        verdict.violations.append(f"chord-audit: exit code {done.returncode}: {done.stdout[-500:]}{done.stderr[-500:]}")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        verdict.violations.append(f"chord-audit: no JSON: {done.stdout[-300:]}")
        return
    verdict.is_audited = True
    verdict.lost = max(verdict.lost, int(found["lost"]))
    verdict.duplicates = max(verdict.duplicates, int(found["duplicates"]))
    verdict.violations += [f"chord-audit: {line}" for line in found["violations"]]
