"""Alerts and recording rules, by promtool and amtool; every alert has its runbook, and cases for and against it."""

import re
import subprocess
from collections import Counter

import yaml

from tests.deploy.boards import dashboards, panels
from tests.deploy.promql import metrics_of
from tests.deploy.rules import OF_CLUSTERS, PROMETHEUS, alerts, cluster_alerts, recordings
from tests.deploy.tools import ROOT

CASES = sorted((ROOT / "tests" / "deploy" / "rules").glob("*.yml"))
RUNBOOKS = (ROOT / "deploy" / "RUNBOOKS.md").read_text()
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOKS, flags=re.M | re.S))
PARTS = ("Means", "Look first", "Do", "Do not")


def run(*command: object) -> str:
    done = subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_finds_no_fault_in_configuration_and_rules() -> None:
    said = run("promtool", "check", "config", "--lint=all", "--lint-fatal", PROMETHEUS / "prometheus.yml")
    assert "WARNING" not in said
    rules = [*sorted((PROMETHEUS / "rules").glob("*.yml")), OF_CLUSTERS]
    said = run("promtool", "check", "rules", "--lint=all", "--lint-fatal", *rules)
    num_rules = len(alerts()) + len(cluster_alerts()) + len(recordings())
    assert sum(map(int, re.findall(r"SUCCESS: (\d+) rules found", said))) == num_rules


def test_every_alert_fires_where_it_must_and_nowhere_else() -> None:
    said = run("promtool", "test", "rules", *CASES)
    assert said.count("SUCCESS") == len(CASES)
    fires, is_silent = Counter[str](), Counter[str]()
    for path in CASES:
        for case in yaml.safe_load(path.read_text())["tests"]:
            for asked in case["alert_rule_test"]:
                (fires if asked["exp_alerts"] else is_silent)[asked["alertname"]] += 1
    names = {alert.name for alert in alerts() + cluster_alerts()}
    assert set(fires) == names
    assert set(is_silent) == names


def test_every_alert_says_how_urgent_it_is_and_leads_to_its_runbook() -> None:
    for alert in alerts() + cluster_alerts():
        assert alert.labels["severity"] in {"critical", "warning", "info"}, alert.name
        assert set(alert.annotations) == {"summary", "description", "runbook_url"}, alert.name
        assert alert.annotations["runbook_url"] == f"deploy/RUNBOOKS.md#{alert.name.lower()}"
        assert all(f"**{part}.**" in SECTIONS[alert.name] for part in PARTS), alert.name
    assert list(SECTIONS) == [alert.name for alert in alerts() + cluster_alerts()]


def test_runbooks_name_panels_that_there_are() -> None:
    titles = {panel["title"] for board in dashboards() for panel in panels(board)}
    prose = re.sub(r"`[^`]*`", "", RUNBOOKS)
    named = {" ".join(name.split()) for name in re.findall(r"(?<!\*)\*([^*]+)\*(?!\*)", prose)}
    assert named
    assert {name.rpartition(" / ")[2] for name in named} <= titles


def test_rules_name_only_series_of_ours() -> None:
    recorded = {rule.name for rule in recordings()}
    named = {name for names in metrics_of([rule.expression for rule in alerts() + recordings()]) for name in names}
    assert {name for name in named if ":" in name} <= recorded
    assert {name for name in named - recorded if not name.startswith("chord_")} == {"up", "process_start_time_seconds"}


def test_a_learner_that_is_down_silences_what_follows_from_it_and_critical_alerts_page() -> None:
    config = PROMETHEUS / "alertmanager.yml"
    run("amtool", "check-config", config)
    routes = ("amtool", "config", "routes", "test", f"--config.file={config}")
    for severity, receiver in (("critical", "page"), ("warning", "ticket"), ("info", "nobody")):
        assert run(*routes, f"severity={severity}", "run=demo").split() == [receiver]
    (rule,) = yaml.safe_load(config.read_text())["inhibit_rules"]
    assert rule == {
        "source_matchers": ['alertname="ChordLearnerDown"'],
        "target_matchers": ['alertname=~"Chord.+"', 'alertname!="ChordLearnerDown"'],
        "equal": ["run"],  # another run's alerts are not silenced
    }
    names = {alert.name for alert in alerts()}
    assert "ChordLearnerDown" in names
    assert all(re.fullmatch("Chord.+", name) for name in names)
