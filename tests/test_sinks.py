"""Sinks: what TensorBoard and W&B are shown of a run, read back with their own readers; a fault costs a warning."""

import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.config.load import resolve_config
from common.config.run import SinkName
from common.errors import ConfigError, OperatorError
from common.run_dir import RunDir
from common.sinks import require_sinks
from learner.ledger.history import Composition
from learner.ledger.ledger import Ledger
from learner.recorder import Recorder
from learner.sinks.feed import MAX_WAITING, Feed, Feeds, open_feeds
from learner.sinks.sink import Point
from tests.runs import LocalRun, import_experts, read_lines, write_config
from tests.wandb_service import WandbService


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("SILENT", "DISABLE_GIT", "X_DISABLE_STATS"):
        monkeypatch.setenv(f"WANDB_{name}", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.delenv("WANDB_SERVICE", raising=False)  # left by W&B in this process: a child would share its service
    monkeypatch.setattr("learner.sinks.feed.CLOSE_S", 120.0)  # a busy machine is no failure here


class Start:
    """One start of a learner, as far as its records go."""

    def __init__(self, folder: Path, *sinks: SinkName) -> None:
        config = resolve_config(None, [f"run.dir={folder}", f"run.sinks={json.dumps(sinks)}"]).config
        self.ledger = Ledger(folder / "ledger.sqlite", groups_per_step=1, max_staleness=0)
        self.recorder = Recorder(folder, self.ledger, open_feeds(config, RunDir(folder), self.ledger))
        self.recorder.restore()

    def take(self, step: int, **values: Any) -> None:
        """The step that completes `step` steps."""
        self.ledger.commit_batch(Composition(step - 1, (), (), 0))
        self.recorder.add_step(
            {
                "step": step, "loss": 1.0 / step, "reward_mean": None, "num_groups": 0, "num_policy_tokens": 0.0,
                "num_expert_tokens": 8.0, "num_expert_rows": 2, "step_s": 1.0,
                "wait_s": 0.0, "train_s": 1.0, "publish_s": 0.0, "staleness_histogram": {},
                "groups_by_actor": {"actor-0": 3},
            } | values
        )  # fmt: skip

    def evaluate(self, step: int, accuracy: float) -> None:
        line = {
            "step": step, "task": "sums", "accuracy": accuracy, "confidence_95": [accuracy - 0.1, accuracy + 0.1],
            "pass_at_k": {"1": accuracy}, "version_hash": "0" * 32, "time": time.time(),
        }  # fmt: skip
        self.ledger.evaluations.owe(step)
        self.ledger.evaluations.finish(step, [line])
        self.recorder.add_evaluation([line])

    def end(self) -> None:
        self.recorder.sinks.close()
        assert self.recorder.sinks.failures == {}
        self.ledger.close()


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return found


def scalars(found: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, round(event.value, 4)) for event in found.Scalars(tag)]


def wandb_rows(folder: Path) -> list[dict[str, Any]]:
    """The history of an offline folder, as W&B's own `wandb sync` sends it."""
    with WandbService() as service:
        run_wandb(service, folder.parent.parent, "-m", "wandb", "sync", str(folder))
        return service.rows


def run_wandb(service: WandbService, folder: Path, *arguments: str) -> None:
    """`folder`: where W&B may leave logs."""
    account = {
        "WANDB_DIR": str(folder),
        "WANDB_MODE": "online",
        "WANDB_BASE_URL": service.url,
        "WANDB_API_KEY": "0" * 40,
    }
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=inherited | account, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr + str(service.operations)


def wandb_folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*"))


def column(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def test_steps_and_evaluations_stand_on_the_axis_of_steps(tmp_path: Path) -> None:
    start = Start(tmp_path, *SinkName)
    start.take(1)
    start.take(2, loss=math.nan)
    start.evaluate(1, 0.25)  # it comes late, as evaluations do
    start.take(4)
    start.end()
    found = events(tmp_path)
    assert [step for step, _ in scalars(found, "train/loss")] == [1, 2, 4]
    assert scalars(found, "train/loss")[2] == (4, 0.25)
    assert math.isnan(scalars(found, "train/loss")[1][1])
    assert scalars(found, "eval/sums/accuracy") == [(1, 0.25)]
    assert scalars(found, "eval/sums/confidence_95/low") == [(1, 0.15)]
    assert scalars(found, "eval/sums/pass_at_k/1") == [(1, 0.25)]
    recorded = read_lines(tmp_path / "metrics.jsonl")
    assert [event.wall_time for event in found.Scalars("train/loss")] == pytest.approx([r["time"] for r in recorded])
    assert not [tag for tag in found.Tags()["scalars"] if "actor-0" in tag or "reward_mean" in tag]
    (offline,) = wandb_folders(tmp_path)
    rows = wandb_rows(offline)
    assert [step for step, _ in column(rows, "train/loss")] == [1, 2, 4]
    assert column(rows, "eval/sums/accuracy") == [(1, 0.25)]
    assert [row["_timestamp"] for row in rows if "train/loss" in row] == pytest.approx([r["time"] for r in recorded])


CRASHED = """
import os, sys
from pathlib import Path
from common.config.run import SinkName
from tests.test_sinks import Start, events, scalars, wait_until

folder = Path(sys.argv[1])
start = Start(folder, *SinkName)
for step in (1, 2, 3):
    start.take(step)
start.evaluate(2, 0.5)
wait_until((folder / "tensorboard").exists)
wait_until(lambda: "eval/sums/accuracy" in events(folder).Tags()["scalars"])
wait_until(lambda: list(folder.glob("wandb/offline-run-*")))
os.kill(os.getpid(), 9)
"""


def test_a_start_after_a_crash_shows_every_step_once_even_to_who_is_looking_on(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CRASHED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert len(wandb_folders(tmp_path)) == 1
    looking_on = events(tmp_path)
    assert [step for step, _ in scalars(looking_on, "train/loss")] == [1, 2, 3]
    time.sleep(1.1)  # TensorBoard tells older files from newer ones by the second in their names
    start = Start(tmp_path, *SinkName)
    start.take(4)
    start.end()
    looking_on.Reload()
    for found in (looking_on, events(tmp_path)):
        assert [step for step, _ in scalars(found, "train/loss")] == [1, 2, 3, 4]
        assert scalars(found, "eval/sums/accuracy") == [(2, 0.5)]
    (offline,) = wandb_folders(tmp_path)
    rows = wandb_rows(offline)
    assert [step for step, _ in column(rows, "train/loss")] == [1, 2, 3, 4]
    assert column(rows, "eval/sums/accuracy") == [(2, 0.5)]


def test_a_rewind_is_forgotten_or_another_run_where_nothing_can_be_taken_back(tmp_path: Path) -> None:
    start = Start(tmp_path, *SinkName)
    for step in (1, 2, 3):
        start.take(step)
    start.evaluate(3, 0.9)
    start.ledger.rewind(1)
    start.end()
    start = Start(tmp_path, *SinkName)
    start.take(2, loss=7.0)
    start.end()
    assert scalars(events(tmp_path), "train/loss") == [(1, 1.0), (2, 7.0)]
    assert "eval/sums/accuracy" not in events(tmp_path).Tags()["scalars"]
    first, second = sorted(wandb_folders(tmp_path), key=lambda path: len(path.name))
    assert second.name.endswith(f"{first.name.rpartition('-')[2]}-1")
    assert column(wandb_rows(second), "train/loss") == [(1, 1.0), (2, 7.0)]


ONLINE = """
import sys
from pathlib import Path
from learner.sinks.sink import Point
from learner.sinks.wandb import WeightsAndBiases

sink = WeightsAndBiases(Path(sys.argv[1]), run_id="abc", name="run", config={})
for step in range(1, int(sys.argv[2]) + 1):
    sink.add(Point("train", step, 1e9 + step, {"loss": 1 / step}))
    if step % 2 == 0:
        sink.add(Point("eval/sums", step - 1, 1e9 + step, {"accuracy": step / 10}))
sink.close()
"""


def test_online_a_resumed_run_is_sent_only_what_the_service_lacks(tmp_path: Path) -> None:
    with WandbService() as service:
        for num_steps in (3, 6):
            run_wandb(service, tmp_path, "-c", ONLINE, str(tmp_path / "wandb"), str(num_steps))
    assert column(service.rows, "train/loss") == [(step, 1 / step) for step in range(1, 7)]
    assert column(service.rows, "eval/sums/accuracy") == [(1, 0.2), (3, 0.4), (5, 0.6)]


def wait_until(is_reached: Callable[[], bool], limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while not is_reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Bad:
    """A sink that fails, or hangs, when it is given a point."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.is_reached = threading.Event()
        self.may_go_on = threading.Event()
        self.hangs = hangs

    def add(self, point: Point) -> None:
        self.is_reached.set()
        if self.hangs:
            self.may_go_on.wait(60)
        else:
            raise OSError("the network is on fire")

    def close(self) -> None: ...


def point(step: int) -> Point:
    return Point("train", step, 0.0, {"loss": 1.0})


def test_a_sink_that_fails_costs_one_warning_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    good: list[Point] = []

    class Good:
        def add(self, point: Point) -> None:
            good.append(point)

        def close(self) -> None: ...

    feeds = Feeds([Feed("bad", Bad), Feed("good", Good), Feed("absent", lambda: 1 / 0)])  # pyright: ignore
    feeds.begin([point(1)])
    wait_until(lambda: len(feeds.failures) == 2)
    for step in (2, 3):
        feeds.add(point(step))
    feeds.close()
    assert [point.step for point in good] == [1, 2, 3]
    assert feeds.failures["bad"] == "OSError: the network is on fire"
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 2
    assert any("run.sinks: bad is left alone from now on, training goes on: OSError" in line for line in warnings)


def test_a_sink_that_hangs_holds_up_neither_a_step_nor_the_end(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learner.sinks.feed.CLOSE_S", 0.5)
    late, slow = Bad(hangs=True), Bad(hangs=True)
    feeds = Feeds([Feed("late", lambda: late), Feed("slow", lambda: slow)])
    feeds.begin([])
    feeds.add(point(1))
    started = time.monotonic()
    feeds.close()
    assert time.monotonic() - started < 5
    assert feeds.failures["late"] == "it had not shown the last points within 0 s"
    flooded = Feed("flooded", lambda: slow)
    flooded.begin([])
    started = time.monotonic()
    for step in range(MAX_WAITING + 5):
        flooded.add(point(step))
    assert time.monotonic() - started < 5
    assert flooded.failure == f"it is {MAX_WAITING} points behind"
    for bad in (late, slow):
        bad.may_go_on.set()
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 3


def test_a_sink_whose_package_is_missing_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    require_sinks(SinkName)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(OperatorError) as refused:
        require_sinks([SinkName.WANDB])
    assert str(refused.value) == (
        'run.sinks: got "wandb", which is not installed, expected: pip install ".[wandb]" in the checkout'
    )


def test_a_sink_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"""run.sinks: got "mlflow", expected 'tensorboard' or 'wandb'"""):
        resolve_config(None, ['run.sinks=["mlflow"]'])


def test_a_whole_run_with_a_killed_learner_is_shown_once_by_both(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, run={"sinks": ["tensorboard", "wandb"]}, actor={"engine": "simulated"},
        learner={"num_steps": 8, "checkpoint_every_steps": 3, "num_threads": 1}, eval={"every_steps": 4},
    )  # fmt: skip
    import_experts(config)
    with LocalRun(config) as run:
        run.wait_until(lambda: run.num_steps_done() >= 4)
        run.components()["learner"].kill()
        run.finish()
    assert "is left alone" not in run.output
    lines = read_lines(run.folder / "metrics.jsonl")
    evaluated = [line["step"] for line in read_lines(run.folder / "eval.jsonl")]
    found = events(run.folder)
    assert scalars(found, "train/reward_mean") == [(line["step"], round(line["reward_mean"], 4)) for line in lines]
    assert sorted(step for step, _ in scalars(found, "eval/chain_sum/accuracy")) == evaluated == [0, 4, 8]
    (offline,) = wandb_folders(run.folder)
    rows = wandb_rows(offline)
    assert column(rows, "train/loss") == [(line["step"], line["loss"]) for line in lines]
    assert sorted(step for step, _ in column(rows, "eval/chain_sum/accuracy")) == evaluated
