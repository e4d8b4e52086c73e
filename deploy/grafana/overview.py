"""The dashboard *Overview*: one run, from its health to its speed."""

from typing import Any

from deploy.grafana.panels import board
from deploy.grafana.rows import expert, flow, health, learning, performance, weights


def overview() -> dict[str, Any]:
    return board(
        "chord-rl: Overview",
        "One run: is it well, does work flow, does the policy learn, and how fast.",
        uid="chord-overview",
        members="chord_build_info",
        rows=[row.ROW for row in (health, flow, learning, weights, expert, performance)],
    )
