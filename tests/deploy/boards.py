"""The dashboards of `deploy/grafana/`, as Grafana reads them."""

import json
from typing import Any

from tests.deploy.tools import ROOT

GRAFANA = ROOT / "deploy" / "grafana"


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((GRAFANA / "dashboards").glob("*.json"))]


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Every panel but the headings, those of folded rows too."""
    found = [one for panel in board["panels"] for one in (panel, *panel.get("panels", ()))]
    return [panel for panel in found if panel["type"] != "row"]


def queries(board: dict[str, Any]) -> list[tuple[str, str]]:
    """Panel title and expression."""
    return [(panel["title"], target["expr"]) for panel in panels(board) for target in panel["targets"]]
