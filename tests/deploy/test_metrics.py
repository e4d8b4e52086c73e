"""What real components serve, by Prometheus' own linter."""

import re
import subprocess
import urllib.request
from pathlib import Path

import pytest

from tests.deploy.metrics_table import rows
from tests.runs import LocalRun, import_experts, read_lines, write_config


@pytest.fixture(scope="module")
def outputs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By component, what /metrics answered in a run of two ranks, an actor and an evaluator."""
    folder = tmp_path_factory.mktemp("run")
    config = write_config(
        folder, tiny_model, run={"num_actors": 1}, actor={"engine": "simulated"},
        learner={"num_steps": 100_000, "num_ranks": 2, "num_threads": 1}, eval={"every_steps": 100_000},
    )  # fmt: skip
    import_experts(config)
    with LocalRun(config) as run:
        run.wait_until(lambda: run.num_steps_done() >= 3 and len(read_lines(run.folder / "eval.jsonl")) == 1)
        logs = {log.stem: log.read_text() for log in (run.folder / "logs").glob("*.log")}
        texts = {
            f"{name} {number}": read(url)
            for name, log in logs.items()
            for number, url in enumerate(re.findall(r"metrics: (http://\S+)", log))
        }
        run.stop()
        run.finish()
    return texts


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as reply:
        return reply.read().decode()


def test_promtool_finds_nothing_to_say_of_any_component(outputs: dict[str, str]) -> None:
    assert sorted(outputs) == ["actor-0 0", "evaluator 0", "learner 0", "learner 1"]
    for name, text in outputs.items():
        checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", ""), name


def test_every_metric_of_the_table_is_served_by_its_component(outputs: dict[str, str]) -> None:
    told = {re.findall(r'chord_build_info{.*component="(\w+)"', text)[0]: text for text in outputs.values()}
    assert sorted(told) == ["actor", "evaluator", "learner", "rank"]
    for row in rows():
        for component in told if row.component == "every" else row.component.split(", "):
            assert f"# TYPE {row.name} {row.type}\n" in told[component], (component, row)
