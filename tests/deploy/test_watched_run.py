"""A real run under chord-local, scraped by a real Prometheus: every expression gets its numbers, no rule cries wolf."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.wire.ports import free_ports, is_free
from tests.deploy.boards import dashboards, queries
from tests.deploy.prometheus import Prometheus
from tests.deploy.promql import metrics_of, without_variables
from tests.deploy.rules import alerts, recordings
from tests.runs import LocalRun, import_experts, write_config

RUN = "watched"
MAY_BE_PENDING = {"ChordStalenessAtBound", "ChordQueueSaturated"}
"""A tiny learner is the slower side, which is no fault; both take half an hour to fire."""


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LocalRun, Prometheus]]:
    """Two actors with simulated engines, an evaluator and a learner with demonstrations; and who watches them."""
    folder = tmp_path_factory.mktemp("watched")
    learner, evaluator, server = free_ports(3, "127.0.0.1")
    first_actor = next(port for port in free_ports(20, "127.0.0.1") if is_free("127.0.0.1", port + 1))
    config = write_config(
        folder, tiny_model, actor={"engine": "simulated", "metrics_port": first_actor},
        learner={"num_steps": 100_000, "checkpoint_every_steps": 5, "metrics_port": learner},
        eval={"every_steps": 10, "num_problems": 8, "metrics_port": evaluator}, expert={"rows_per_step": 1},
    )  # fmt: skip
    import_experts(config, num_rows=500)
    jobs = {"chord-learner": [learner], "chord-actor": [first_actor, first_actor + 1], "chord-eval": [evaluator]}
    with LocalRun(config) as local, Prometheus(folder / "prometheus", port=server, run=RUN, targets=jobs) as prometheus:
        prometheus.wait_until_ready()
        local.wait_until(lambda: len(prometheus.numbers("up == 1")) == 4, timeout_s=300)
        yield local, prometheus


def eventually(read: Callable[[], Any], expected: Any, *, within_s: float = 120) -> None:
    """What takes a few steps to come true; fails with what was read last."""
    deadline = time.monotonic() + within_s
    while (found := read()) != expected and time.monotonic() < deadline:
        time.sleep(1)
    assert found == expected


def states(prometheus: Prometheus) -> dict[str, str]:
    """Of every alert: inactive, pending or firing."""
    groups = prometheus.get("rules", type="alert")["groups"]
    return {rule["name"]: rule["state"] for group in groups for rule in group["rules"]}


def test_every_expression_of_the_dashboards_returns_numbers(run: tuple[LocalRun, Prometheus]) -> None:
    _, prometheus = run
    asked = [query for board in dashboards() for query in queries(board)]

    def without_numbers() -> list[tuple[str, str]]:
        return [(title, text) for title, text in asked if not prometheus.numbers(without_variables(text, run=RUN))]

    eventually(without_numbers, [])


def test_every_recording_rule_returns_numbers_for_the_run(run: tuple[LocalRun, Prometheus]) -> None:
    _, prometheus = run
    eventually(lambda: [r.name for r in recordings() if not prometheus.numbers(f'{r.name}{{run="{RUN}"}}')], [])


def test_every_variable_of_the_dashboards_finds_its_values(run: tuple[LocalRun, Prometheus]) -> None:
    _, prometheus = run

    def num_values() -> dict[tuple[str, str], int]:
        found: dict[tuple[str, str], int] = {}
        for board in dashboards():
            for variable in board["templating"]["list"][1:]:
                series, _, label = variable["query"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
                values = prometheus.get(f"label/{label}/values", **{"match[]": without_variables(series, run=RUN)})
                found[board["uid"], label] = len(values)
        return found

    eventually(num_values, {
        ("chord-overview", "job"): 3, ("chord-overview", "run"): 1, ("chord-overview", "instance"): 4,
        ("chord-fleet", "job"): 1, ("chord-fleet", "run"): 1, ("chord-fleet", "instance"): 2,
    })  # fmt: skip


def test_every_metric_that_a_rule_names_is_exported(run: tuple[LocalRun, Prometheus]) -> None:
    _, prometheus = run
    named = {name for names in metrics_of([rule.expression for rule in alerts() + recordings()]) for name in names}
    eventually(lambda: named - set(prometheus.get("label/__name__/values")), set())


def test_every_rule_is_evaluated_without_error_and_every_alert_is_silent(run: tuple[LocalRun, Prometheus]) -> None:
    _, prometheus = run
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert len(rules) == len(alerts()) + len(recordings())
    assert [rule["name"] for rule in rules if rule["health"] != "ok" or rule.get("lastError")] == []
    assert "firing" not in states(prometheus).values()
    eventually(
        lambda: {name for name, state in states(prometheus).items() if state != "inactive"} - MAY_BE_PENDING, set()
    )


def test_an_actor_that_hangs_is_missed(run: tuple[LocalRun, Prometheus]) -> None:
    local, prometheus = run
    eventually(lambda: states(prometheus)["ChordActorMissing"], "inactive")
    pid = local.components()["actor-0"].pid
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: states(prometheus)["ChordActorMissing"], "pending", within_s=30)
    finally:
        os.kill(pid, signal.SIGKILL)  # a stopped process does not heed the end of its parent
