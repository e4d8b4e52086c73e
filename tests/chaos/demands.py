"""What chaos.json must show: every number that is measured is held against a limit."""

from collections.abc import Mapping
from typing import Any

from tests.chaos.schedule import COUNTS

TRAINING_AGAIN_S = 10.0
"""From the kill of a learner to its training again; the tiny model loads at once."""
NOTICE_S = 5.0
"""From a black hole to the learner's notice of it."""
MIN_KILLS = 200
MIN_LEARNER_KILLS = 20
MIN_FAULTS_OF_A_CLASS = 5


def unmet(report: Mapping[str, Any]) -> list[str]:
    """A line for each demand that the report does not meet. How many faults there were is judged by class at
    full scale only."""
    settings = report["conditions"]
    lines = [
        _above("training_again_s p99", report["training_again_s"].get("p99", 0.0), TRAINING_AGAIN_S),
        _above("black_hole_noticed_s max", report["black_hole_noticed_s"].get("max", 0.0), NOTICE_S),
        _above("stopped_for_good, not found", report["stopped_for_good"].get("not found", 0), 0),
        _below("runs_ended", report["runs_ended"], report["runs"]),
        _below("faults that struck", sum(report["faults_by_class"].values()), 1),
        _below("is_audited", report["is_audited"], True),
        _below("receipts_checked", report["receipts_checked"], 1),
    ]
    if not settings["only"]:
        lines += [_below(f"crash points of {name}", count, 1) for name, count in report["crash_points"].items()]
        lines.append(_below("kinds of crash points", len(report["crash_points"]), 1))
    if settings["scale"] >= 1 and not settings["only"]:
        struck, kills = report["faults_by_class"], report["kills_by_component"]
        lines += [
            _below("kills", report["kills"], MIN_KILLS),
            _below("kills of the learner", kills.get("learner", 0), MIN_LEARNER_KILLS),
            *(_below(f"faults of class {name}", struck.get(name, 0), MIN_FAULTS_OF_A_CLASS) for name in COUNTS),
        ]
    return [line for line in lines if line]


def _above(what: str, got: float, limit: float) -> str:
    return f"{what}: got {got}, expected at most {limit}" if got > limit else ""


def _below(what: str, got: float, limit: float) -> str:
    return f"{what}: got {got}, expected at least {limit}" if got < limit else ""
