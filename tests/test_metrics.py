"""Metrics: every one is in the table of deploy/README.md, and none shows a number that nobody has measured."""

import math
import sqlite3
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily

from actors.metrics import ActorMetrics
from common.metrics import Reading
from learner.metrics import GAUGES, LearnerMetrics
from tests.deploy.metrics_table import README, SECTION, rows, table

RECORD: dict[str, Any] = {
    **dict.fromkeys(GAUGES, 0.5), "num_groups": 2, "num_policy_tokens": 30, "num_expert_tokens": 20,
    "num_expert_rows": 3, "step_s": 4.0, "wait_s": 1.0, "train_s": 2.0, "publish_s": 0.5,
    "staleness_histogram": {"0": 1, "1": 1},
}  # fmt: skip


def test_the_table_in_the_operators_readme_is_that_of_the_code() -> None:
    found = SECTION.search(README.read_text())
    assert found
    assert found[2] == table(), "run: python -m tests.deploy.metrics_table"


def test_names_follow_prometheus_and_every_help_is_a_sentence() -> None:
    for row in rows():
        assert row.name.startswith("chord_"), row
        assert row.help.endswith("."), row
        assert (row.type == "counter") == row.name.endswith("_total"), row
        assert row.type != "histogram" or row.name.endswith(("_seconds", "_steps")), row
    assert len({row.name for row in rows()}) == len(rows())


def test_what_no_step_has_measured_has_no_series() -> None:
    metrics = LearnerMetrics()
    for name, _ in GAUGES.values():
        assert metrics.registry.get_sample_value(name) is None
    metrics.observe({**RECORD, "mu_effective": None, "policy_entropy": None})
    assert metrics.registry.get_sample_value("chord_reward_mean") == 0.5
    assert metrics.registry.get_sample_value("chord_policy_entropy_nats") is None
    assert ActorMetrics().registry.get_sample_value("chord_actor_version_step") is None


def test_a_restarted_learner_shows_where_the_run_stands_and_counts_from_0() -> None:
    metrics = LearnerMetrics()
    metrics.restore({**RECORD, "step": 12, "time": 1.7e9})
    assert metrics.registry.get_sample_value("chord_learner_step") == 12
    assert metrics.registry.get_sample_value("chord_learner_last_step_timestamp_seconds") == 1.7e9
    assert metrics.registry.get_sample_value("chord_groups_trained_total") == 0


def test_a_loss_that_is_not_a_number_is_shown_as_such() -> None:
    metrics = LearnerMetrics()
    metrics.observe({**RECORD, "loss": math.nan})
    assert "chord_loss NaN" in generate_latest(metrics.registry).decode()


def test_what_cannot_be_read_takes_no_other_metric_away() -> None:
    def fail() -> float:
        raise sqlite3.OperationalError("disk I/O error")

    registry = CollectorRegistry()
    registry.register(Reading(GaugeMetricFamily, "chord_a", "A.", fail))
    registry.register(Reading(GaugeMetricFamily, "chord_b", "B.", lambda: {("x",): 1, ("y",): 0}, labels=["of"]))
    said = generate_latest(registry).decode().splitlines()
    assert [line for line in said if not line.startswith("#")] == ['chord_b{of="x"} 1.0', 'chord_b{of="y"} 0.0']
