"""The page: one HTML file with its style, its scripts and its data, which asks nobody for anything.

Data is compressed and told apart by what needs it first: charts and records as JSON, then the columns of all tokens.
"""

import base64
import gzip
import html
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np

from learner.report.charts import make_charts
from learner.report.run import Run
from learner.report.trajectories import Records

SCRIPTS = ("data.js", "chart.js", "text.js", "answers.js", "browser.js", "main.js")
_LEVEL = 5
"""Of compression: higher ones take several times as long for a few per cent."""


def make_page(runs: Sequence[Run], records: Records) -> str:
    """Everything that goes into a file; text of the runs stands in compressed data only, or escaped."""
    vocabulary = np.frombuffer(b"".join(records.vocabulary), dtype=np.uint8)
    sizes = np.array([len(piece) for piece in records.vocabulary], dtype=np.uint32)
    layout, data = _lay_out({**records.columns, "pieceSizes": sizes, "pieces": vocabulary})
    known = {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "runs": [_describe(run) for run in runs],
        "charts": [asdict(chart) for chart in make_charts(runs)],
        "groups": records.groups,
        "answers": records.answers,
        "numLeftOut": records.num_left_out,
        "sample": _describe_sample(runs, records),
        "layout": layout,
    }
    parts = {
        "title": html.escape(", ".join(run.name for run in runs)),
        "style": _asset("page.css"),
        "known": _pack(json.dumps(_finite(known), separators=(",", ":")).encode()),
        "tokens": _pack(data),
        "script": "\n".join(_asset(name) for name in SCRIPTS),
    }
    page = _asset("page.html")
    for name, text in parts.items():
        page = page.replace(f"<!-- {name} -->", text, 1)
    return page


def _asset(name: str) -> str:
    return files("learner.report").joinpath(name).read_text(encoding="utf-8")


def _pack(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, _LEVEL, mtime=0)).decode()


def _lay_out(columns: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """Columns one after the other, the widest numbers first, so that each begins at a multiple of its own width."""
    layout: dict[str, Any] = {}
    parts, end = list[bytes](), 0
    for name, column in sorted(columns.items(), key=lambda item: -item[1].itemsize):
        parts.append(column.tobytes())
        layout[name] = {"kind": column.dtype.name, "start": end, "length": len(column)}
        end += len(parts[-1])
    return layout, b"".join(parts)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null in their place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def _describe(run: Run) -> dict[str, Any]:
    """A run's line of the table at the head of the page."""
    return {
        "name": run.name,
        "weighting": run.setting("algorithm", "expert_weighting"),
        "facts": {
            "method": run.setting("algorithm", "preset"),
            "max staleness": run.setting("algorithm", "max_staleness"),
            "steps": f"{run.num_steps} of {run.setting('learner', 'num_steps')}",
            "state": _state(run),
            "reward": _from_to([line.get("reward_mean") for line in run.lines]),
            "accuracy": _from_to([one["accuracy"] for one in run.evaluations if one["task"] == _first_task(run)]),
            "trajectories": sum(line.get("num_trajectories", 0) for line in run.lines),
            "largest staleness": max((line.get("staleness_max") or 0 for line in run.lines), default=0),
            "lost, duplicates": f"{run.summary['lost']}, {run.summary['duplicates']}" if run.summary else "–",
            "hours": f"{run.lines[-1].get('run_wall_s', 0.0) / 3600:.2f}" if run.lines else "–",
        },
        "notes": run.notes,
    }


def _describe_sample(runs: Sequence[Run], records: Records) -> str:
    """How many of the trajectories that were trained on stand in the page."""
    num_here = sum(not records.groups[answer["group"]]["isExpert"] for answer in records.answers)
    num_trained = sum(line.get("num_trajectories", 0) for run in runs for line in run.lines)
    if num_here >= num_trained:  # a step's excerpt may be there before its line
        return f"All {num_here:,} trajectories that were trained on."
    return (
        f"{num_here:,} of {num_trained:,} trajectories that were trained on: "
        "of each step run.excerpt_groups_per_step groups are kept, drawn at random."
    )


def _first_task(run: Run) -> str | None:
    return run.evaluations[0]["task"] if run.evaluations else None


def _state(run: Run) -> str:
    if run.status:
        waiting = run.status.get("waiting_for")
        return f"going on: {run.status.get('phase')}{f', waits for {waiting}' if waiting else ''}"
    return "ended" if run.num_steps == run.setting("learner", "num_steps") else "stopped"


def _from_to(values: list[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{found[0]:.3f} → {found[-1]:.3f}" if found else "–"
