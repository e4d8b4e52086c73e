"""The dashboards: made from their source, complete, laid out without overlap, and provisioned."""

import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.boards import GRAFANA, dashboards, panels, queries
from tests.deploy.promql import PYTHON, metrics_of
from tests.deploy.tools import ROOT

BOARDS = dashboards()
EACH = pytest.mark.parametrize("board", BOARDS, ids=[board["uid"] for board in BOARDS])
ROWS = {
    "chord-overview": ["Health", "Flow", "Learning", "Weights", "Expert store", "Performance"],
    "chord-fleet": ["Actors", "The worst engine beside the mean", "Actor $instance"],
}


def test_the_json_is_what_its_source_writes(tmp_path: Path) -> None:
    done = subprocess.run([PYTHON, "-m", "deploy.grafana", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    committed = {path.name: path.read_text() for path in (GRAFANA / "dashboards").iterdir()}
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == committed


@EACH
def test_a_dashboard_has_its_rows_and_variables(board: dict[str, Any]) -> None:
    rows = [panel for panel in board["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in rows] == ROWS[board["uid"]]
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "job", "run", "instance"]
    repeated = [row["repeat"] for row in rows if "repeat" in row]
    assert repeated == (["instance"] if board["uid"] == "chord-fleet" else [])


@EACH
def test_every_panel_says_what_it_shows_in_which_unit(board: dict[str, Any]) -> None:
    for panel in panels(board):
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "$datasource", panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"]) > 0, panel["title"]
    ids = [panel["id"] for panel in panels(board)]
    assert len(set(ids)) == len(ids)


@EACH
def test_panels_do_not_overlap(board: dict[str, Any]) -> None:
    for one, other in combinations([panel["gridPos"] for panel in panels(board)], 2):
        assert one["x"] + one["w"] <= 24
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        is_above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert is_beside or is_above, (one, other)


@EACH
def test_every_expression_parses_and_is_of_the_run_that_was_chosen(board: dict[str, Any]) -> None:
    metrics_of([expression for _, expression in queries(board)])
    assert [title for title, expression in queries(board) if 'run="$run"' not in expression] == []


def test_grafana_is_told_where_prometheus_and_the_dashboards_are() -> None:
    sources = yaml.safe_load((GRAFANA / "provisioning" / "datasources" / "chord.yaml").read_text())
    scraped = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    assert sources["datasources"][0]["type"] == "prometheus"
    assert sources["datasources"][0]["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    providers = yaml.safe_load((GRAFANA / "provisioning" / "dashboards" / "chord.yaml").read_text())["providers"]
    assert providers[0]["type"] == "file"
    assert providers[0]["options"]["path"] in (ROOT / "deploy" / "README.md").read_text()
