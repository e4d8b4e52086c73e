"""The side port: what a component tells Prometheus, and those who keep it running."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from common.errors import OperatorError
from common.side_port import SidePort
from common.watchdog import Watchdog
from common.wire.ports import free_ports, is_free
from tests.runs import QUIET, import_experts, write_config

Labels = dict[str, str]


def ask(port: int, path: str) -> tuple[int, str]:
    """Status and text; (0, "") where nobody answers."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as reply:
            return reply.status, reply.read().decode().strip()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode().strip()
    except OSError:
        return 0, ""


class Scraped:
    """The metrics that a component serves."""

    def __init__(self, port: int) -> None:
        status, text = ask(port, "/metrics")
        assert status == 200, text
        self.samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        self.names = {sample.name for sample in self.samples}

    def value(self, name: str, **labels: str) -> float:
        [value] = [one.value for one in self.samples if one.name == name and labels.items() <= one.labels.items()]
        return value

    def labels(self, name: str) -> list[Labels]:
        return [sample.labels for sample in self.samples if sample.name == name]


@contextmanager
def served(
    registry: CollectorRegistry, *, health: Callable[[], str] = str, readiness: Callable[[], str] = str, port: int = 0
) -> Iterator[int]:
    side_port = SidePort(
        registry, component="actor", engine="simulated", health=health, readiness=readiness, host="127.0.0.1",
        port=port, key="actor.metrics_port",
    )  # fmt: skip
    yield side_port.port
    side_port.close()


def test_healthz_fails_with_the_line_of_the_watch_that_is_overdue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.watchdog.TICK_S", 3600.0)  # it would end this process
    now_s = 0.0
    monkeypatch.setattr("common.watchdog.WakingClock.now_s", property(lambda _: now_s))
    watchdog = Watchdog()
    watchdog.watch("the weight server", limit_s=600)
    inbox = watchdog.watch("the learner's inbox", limit_s=20)
    with served(CollectorRegistry(), health=watchdog.verdict) as port:
        assert ask(port, "/healthz") == (200, "ok")
        inbox.enter("committing", limit_s=20)
        now_s = 30.0
        status, line = ask(port, "/healthz")
        assert status == 503
        assert line.startswith('the learner\'s inbox has not moved for 30 s in phase "committing"')
        inbox.beat()
        assert ask(port, "/healthz") == (200, "ok")
    watchdog.close()


def test_readiness_is_told_to_probes_and_to_prometheus_alike() -> None:
    amiss = ["the actor is starting"]
    with served(CollectorRegistry(), readiness=lambda: "".join(amiss)) as port:
        assert ask(port, "/readyz") == (503, "the actor is starting")
        assert Scraped(port).value("chord_ready") == 0
        amiss.clear()
        assert ask(port, "/readyz") == (200, "ok")
        assert Scraped(port).value("chord_ready") == 1
        assert ask(port, "/") == (404, "expected /metrics, /healthz or /readyz")


def test_every_component_says_what_it_is_and_what_its_process_takes() -> None:
    registry = CollectorRegistry()
    Counter("chord_things_total", "Things.", registry=registry).inc()
    with served(registry) as port:
        scraped = Scraped(port)
    assert scraped.value("chord_build_info", component="actor", engine="simulated") == 1
    assert scraped.value("chord_things_total") == 1
    assert scraped.value("process_start_time_seconds") < time.time()
    assert scraped.value("process_resident_memory_bytes") > 1 << 20
    assert not [name for name in scraped.names if name.endswith("_created")]


def test_one_who_connects_and_says_nothing_holds_nobody_up_and_is_let_go(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("common.side_port.Handler.timeout", 2.0)
    with served(CollectorRegistry()) as port, socket.create_connection(("127.0.0.1", port)) as silent:
        assert ask(port, "/healthz") == (200, "ok")
        silent.settimeout(60)
        assert silent.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_a_port_that_is_taken_is_named_with_its_key() -> None:
    expected = r"actor\.metrics_port: cannot bind 127\.0\.0\.1:\d+ \(Address already in use\), expected a free port"
    with served(CollectorRegistry()) as port, pytest.raises(OperatorError, match=expected):
        served(CollectorRegistry(), port=port).__enter__()


class Component:
    """A component and all that its side port said of its readiness, in order, repeats left out."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path, port: int) -> None:
        self.process = process
        self.log = log
        self.port = port
        self.said: list[str] = []

    def look(self) -> bool:
        """Whether it is ready now; whoever answers is healthy."""
        assert self.process.poll() is None, self.log.read_text()
        status, line = ask(self.port, "/readyz")
        if status:
            assert ask(self.port, "/healthz") == (200, "ok")
            self.said += [line] if self.said[-1:] != [line] else []
        return status == 200


@contextmanager
def running(module: str, config: Path, port: int) -> Iterator[Component]:
    log_path = config.parent / f"{module}.log"
    with log_path.open("wb") as log:
        command = [sys.executable, "-m", module, "--config", str(config)]
        with subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **QUIET}) as process:
            try:
                yield Component(process, log_path, port)
            finally:
                process.kill()


def wait_until(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 600
    while not is_reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_each_component_of_a_run_tells_when_it_is_ready_and_what_it_does(tiny_model: Path, tmp_path: Path) -> None:
    front, actors, evaluators, *pairs = free_ports(16, "127.0.0.1")
    learners = next(port for port in pairs if is_free("127.0.0.1", port + 1))
    config = write_config(
        tmp_path, tiny_model, actor={"engine": "simulated", "metrics_port": actors},
        learner={"num_ranks": 2, "num_steps": 100_000, "num_threads": 1, "metrics_port": learners},
        network={"port": front}, eval={"every_steps": 100_000, "num_problems": 2, "metrics_port": evaluators},
    )  # fmt: skip
    import_experts(config)
    with running("actors", config, actors) as actor, running("actors.evaluator", config, evaluators) as evaluator:
        wait_until(lambda: not (actor.look() or evaluator.look()) and bool(actor.said and evaluator.said))
        with running("learner", config, learners) as learner:
            rank = Component(learner.process, learner.log, learners + 1)  # a child of the launcher
            everybody = (learner, rank, actor, evaluator)
            wait_until(lambda: sum(one.look() for one in everybody) == 4)
            wait_until(lambda: Scraped(learners).value("chord_evaluations_owed") == 0)
            wait_until(lambda: Scraped(evaluators).value("chord_evaluations_total") == 1)
            wait_until(lambda: Scraped(rank.port).value("chord_rank_step") >= 3)
            of_evaluator, of_actor, of_rank, of_learner = (Scraped(one.port) for one in reversed(everybody))
            learner.process.terminate()
            learner.process.wait()
        wait_until(lambda: not actor.look())

    assert learner.said[0] == "the learner grants no leases: starting after step 0"
    assert rank.said == ["rank 1 has joined, and waits for its first step", "ok"]
    assert actor.said[0].startswith("the actor is ")
    assert actor.said[-2] == "ok"
    assert actor.said[-1].startswith("the actor is stale: version ")
    assert evaluator.said[0].startswith("the evaluator")
    assert evaluator.said[-1] == "ok"

    told = [of.labels("chord_build_info")[0]["component"] for of in (of_learner, of_rank, of_actor, of_evaluator)]
    assert told == ["learner", "rank", "actor", "evaluator"]
    assert of_learner.value("chord_learner_step") >= 3
    assert of_learner.value("chord_groups_held_max") == 4
    assert sum(of_learner.value("chord_groups", state=state) for state in ("leased", "committed", "training")) <= 4
    assert of_learner.value("chord_peers", role="actor", state="serving") == 1
    assert of_learner.value("chord_peers", role="actor", state="gone") == 0
    assert of_learner.value("chord_expert_rows") == 40
    assert of_learner.value("chord_expert_rows_used_total") >= 9
    assert 0 < of_learner.value("chord_expert_epochs") < 100
    assert of_learner.value("chord_checkpoint_step") >= 2
    assert time.time() - of_learner.value("chord_checkpoint_timestamp_seconds") < 120
    assert of_learner.value("chord_checkpoint_seconds_count") >= 1
    assert of_learner.value("chord_learner_step_seconds_count") >= 3
    assert time.time() - of_learner.value("chord_learner_last_step_timestamp_seconds") < 120
    assert of_learner.value("chord_version_step") >= of_actor.value("chord_actor_version_step") >= 0
    published = [of_learner.value("chord_weights_published_bytes_total", kind=kind) for kind in ("full", "delta")]
    assert published[0] > published[1] > 0
    assert of_learner.value("chord_weights_sent_bytes_total") > 0
    assert of_actor.value("chord_actor_weight_received_bytes_total") > 0
    assert of_learner.value("chord_inbox_commit_seconds_count") >= 3
    assert of_learner.value("chord_trajectory_received_bytes_total") > 0
    assert 0 < of_learner.value("chord_run_disk_free_bytes") < of_learner.value("chord_run_disk_size_bytes")
    for name in ("chord_groups_lost", "chord_groups_duplicated", "chord_authentication_failures_total"):
        assert of_learner.value(name) == 0
    assert of_actor.value("chord_actor_state", state="serving") == 1
    assert of_actor.value("chord_actor_groups_total", outcome="committed") >= 3
    assert of_actor.value("chord_actor_weight_load_seconds_count") >= 1
    assert of_evaluator.value("chord_evaluations_total") == 1
