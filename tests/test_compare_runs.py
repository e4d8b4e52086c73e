"""`make compare` with real runs of a tiny model: taken and kept; and weights that lag as much as they are to."""

import asyncio
import subprocess
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from common.config.load import resolve_config
from common.version import Version
from common.weights.snapshot import Manifest, Snapshot
from tests.compare.__main__ import Session
from tests.compare.commands import CommandFailed, run_command
from tests.compare.harness import Harness
from tests.compare.lagging import LaggingEngine
from tests.compare.plan import METHODS, fresh, lagged_run, make_plan
from tests.compare.results import load_results
from tests.compare.scale import Scale
from tests.compare.table import BEGIN, END, FIGURE
from tests.compare.task import Family


def make_scale(model: Path, **sizes: object) -> Scale:
    small = Scale(
        model=model, engine="transformers", dtype="float32", num_threads=1, max_model_tokens=512, num_steps=2,
        groups_per_step=2, group_size=2, rows_per_step=2, num_expert_rows=8, eval_every_steps=1,
        num_validation_problems=2, num_test_problems=2, num_test_answers=2, num_retention_problems=2,
        num_entropy_answers=2, families=(Family("gcd", {"max_value": 20}, max_tokens=4),), seeds=(0,), lags=(0, 2),
        lag_seeds=(0,),
        more_lag_seeds=(),
        rates=dict.fromkeys(METHODS, (1e-3,)),
    )  # fmt: skip
    return replace(small, **sizes)


def test_a_run_is_taken_measured_and_kept_so_that_it_is_not_taken_again(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    results, scratch = tmp_path / "compare" / "results", tmp_path / "scratch"
    session = Session(make_scale(tiny_model), results, scratch, tmp_path, Console(), commits=True)
    (tmp_path / "unfinished.txt").touch()
    for words in (["init", "--quiet"], ["config", "user.name", "me"], ["config", "user.email", "me@localhost"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    sft = next(run for run in session.plan()[0] if run.label == "sft")
    session.take(sft)
    result = load_results(results)[sft.name]
    assert result.failure == ""
    assert result.validation["step"] == [0, 1, 2]
    assert result.budget["steps"] == 2
    assert (result.budget["expert_rows"], result.budget["answers"]) == (4, 0)
    assert result.test
    assert (result.test.num_problems, result.test.k, len(result.test.num_right)) == (2, 2, 2)
    assert result.retention.keys() == {"gcd"}
    assert result.entropy
    assert 0 < result.entropy < 6  # nats, of 320 tokens
    assert "1 of 10 runs" in (tmp_path / "README.md").read_text()
    assert (tmp_path / FIGURE).exists()
    assert resolve_config(results / f"{sft.name}.toml").config.algorithm.preset == "sft"
    assert not list(scratch.rglob("*.safetensors")), "no weights are kept"
    told = ["git", "-C", str(tmp_path), "log", "--format=%s", "--name-only"]
    subject, *files = subprocess.run(told, capture_output=True, text=True, check=True).stdout.split("\n")
    assert subject.startswith(f"Compare: {sft.name}, accuracy ")
    assert {Path(file) for file in files if file} == {
        Path("README.md"), Path(FIGURE), Path("compare/compare.json"), Path(f"compare/results/{sft.name}.json"),
        Path(f"compare/results/{sft.name}.toml"),
    }  # fmt: skip
    assert fresh(sft, session.plan()[1]) == result
    assert next(run for run in session.plan()[0] if run.label == "sft_then_rl").is_ready, "its rate is chosen now"


def test_a_run_with_lagging_weights_is_exactly_as_stale_as_planned(tiny_model: Path, tmp_path: Path) -> None:
    scale = make_scale(tiny_model, num_steps=5, lag_sft_steps=3)
    run = lagged_run(scale, seed=0, lag=2, correction="tis", lr=1e-3, sft_lr=1e-3)
    result = Harness(scale, tmp_path / "scratch", tmp_path / "results").take(run)
    assert result.curves["staleness_mean"] == [None, None, None, 0, 1, 2, 2, 2]
    assert result.curves["staleness_max"] == [None, None, None, 0, 1, 2, 2, 2]
    assert result.budget["answers"] == 20
    assert result.retention == {}
    assert result.budget["tokens_sampled"] > 0
    assert result.test


def test_a_run_that_fails_twice_is_kept_as_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text(f"{BEGIN}\n{END}\n")
    results = tmp_path / "compare" / "results"
    session = Session(make_scale(tmp_path / "no-model"), results, tmp_path / "scratch", tmp_path, Console(width=400))
    start = make_plan(session.scale, {})[0]
    session.take(start)
    assert capsys.readouterr().out.count("failed: actors.evaluator ended with 2: chord-eval: model.path: got") == 2
    assert "expected a Hugging Face folder" in load_results(results)[start.name].failure
    assert "Failed twice, and in no mean: methods-start-seed0." in (tmp_path / "README.md").read_text()


def test_a_command_that_outstays_its_time_is_ended(tmp_path: Path) -> None:
    with pytest.raises(CommandFailed, match=r"http\.server went on for 1 s, expected its end"):
        run_command("http.server", "0", "--bind=127.0.0.1", log=tmp_path / "log", limit_s=1.0)
    assert "http.server" not in {word for child in psutil.Process().children() for word in child.cmdline()}


@dataclass
class Served:
    """An engine that only notes what it was given."""

    version: Version | None = None
    steps: list[int] = field(default_factory=list)

    async def load(self, snapshot: Snapshot, *, in_flight: bool = True) -> None:
        assert snapshot.path.read_text() == f"weights {snapshot.version.step}"
        self.version = snapshot.version
        self.steps.append(snapshot.version.step)


def give(lagging: LaggingEngine, folder: Path, step: int) -> None:
    """As the fitter does: a file, which it deletes once the next one is there."""
    for old in folder.glob("*.safetensors"):
        old.unlink()
    path = folder / f"{step}.safetensors"
    path.write_text(f"weights {step}")
    version = Version(run_id="test", incarnation=1, step=step, hash=f"{step:032x}")
    asyncio.run(lagging.load(Snapshot(path, Manifest(version, path.stat().st_size, 1 << 20, ()))))


def test_weights_are_served_when_newer_ones_have_come_and_not_before(tmp_path: Path) -> None:
    served = Served()
    lagging = LaggingEngine(served, lag=2)
    for step in (0, 1, 2, 3, 4):
        give(lagging, tmp_path, step)
    assert served.steps == [0, 1, 2]
    assert lagging.version
    assert lagging.version.step == 4
    assert sorted(path.name for path in (tmp_path / "held").iterdir()) == [f"{step}.safetensors" for step in (2, 3, 4)]


def test_no_version_of_before_the_first_that_samples_is_served_later(tmp_path: Path) -> None:
    served = Served()
    lagging = LaggingEngine(served, lag=2, first=3)
    for step in range(7):
        give(lagging, tmp_path, step)
    assert served.steps == [0, 1, 2, 3, 4]


def test_a_version_that_was_never_fetched_is_made_up_for_by_the_next(tmp_path: Path) -> None:
    """Serving an older one would leave the actor without leases for ever."""
    served = Served()
    lagging = LaggingEngine(served, lag=1)
    for step in (0, 2, 3):
        give(lagging, tmp_path, step)
    assert served.steps == [0, 2]
