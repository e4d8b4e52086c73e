"""Recovery: whatever was killed, the history is the one that would have been; it can be repeated and taken back."""

import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from common.run_dir import RunDir
from learner.excerpts.folder import ExcerptFolder
from tests.runs import LocalRun, audit, import_experts, read_lines, read_summary, run_module, write_config

NUM_STEPS = 20


def write_simulated_config(folder: Path, model: Path, *, num_steps: int) -> Path:
    config = write_config(
        folder, model, run={"num_actors": 2}, actor={"engine": "simulated", "tokens_per_s": 30.0},
        eval={"every_steps": 0},
        algorithm={"max_staleness": 2},
        learner={"num_steps": num_steps, "checkpoint_every_steps": 3, "keep_arrivals": True, "num_threads": 1},
    )  # fmt: skip
    import_experts(config)
    return config


@pytest.fixture(scope="module")
def killed_twice(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was."""
    config = write_simulated_config(tmp_path_factory.mktemp("killed"), tiny_model, num_steps=NUM_STEPS)
    with LocalRun(config) as run:
        for reached in (4, 8):
            run.wait_until(lambda reached=reached: run.num_steps_done() >= reached)
            run.kill("learner")
            done = run.num_steps_done()
            run.wait_until(lambda done=done: run.num_steps_done() > done)
            assert audit(run.folder)["violations"] == []  # while it goes on
        run.finish()
    return run.folder


def copy_of(run: Path, folder: Path, model: Path) -> Path:
    """A copy of a finished run, and the configuration with which it goes on."""
    shutil.copytree(run, folder / "run")
    return write_simulated_config(folder, model, num_steps=NUM_STEPS)


def test_a_run_killed_twice_is_bit_for_bit_the_one_that_was_not(killed_twice: Path) -> None:
    assert read_summary(killed_twice)["incarnations"] == 3
    report = audit(killed_twice)
    assert report["violations"] == []
    assert (report["steps"], report["lost"], report["duplicates"]) == (NUM_STEPS, 0, 0)
    assert list(ExcerptFolder(killed_twice / "excerpts").files()) == list(range(1, NUM_STEPS + 1))
    replayed = run_module("learner", "--replay", str(killed_twice)).stdout
    assert f"replayed steps 1 to {NUM_STEPS}: bit for bit, {NUM_STEPS} versions" in replayed
    manifest = json.loads((killed_twice / "checkpoints" / "step-00000020" / "manifest.json").read_text())
    assert replayed.strip().endswith(manifest["parameters_hash"])


def test_a_run_with_sharded_parameters_is_bit_for_bit_the_one_that_was_not_killed(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = write_simulated_config(tmp_path, tiny_model, num_steps=6)
    with LocalRun(config, "learner.zero_stage=3") as run:
        run.wait_until(lambda: run.num_steps_done() >= 4)
        run.kill("learner")
        run.finish()
    assert read_summary(run.folder)["incarnations"] == 2
    assert audit(run.folder)["violations"] == []
    replayed = run_module("learner", "--replay", str(run.folder)).stdout
    assert "replayed steps 1 to 6: bit for bit, 6 versions and the parameters of checkpoints [3, 6]" in replayed


def test_a_run_is_taken_back_and_goes_on_otherwise(killed_twice: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = copy_of(killed_twice, tmp_path, tiny_model)
    folder = tmp_path / "run"
    refused = run_module("learner", "--config", str(config), "--rewind", "17", check=False)
    assert refused.returncode == 2
    assert "got step 17, expected 0 or one with a good checkpoint: [18, 20]" in refused.stderr
    excerpts = ExcerptFolder(folder / "excerpts")
    undone, kept = excerpts.path_of(19).read_bytes(), excerpts.path_of(18).read_bytes()
    said = run_module("learner", "--config", str(config), "--rewind", "18").stdout
    assert "is back at step 18:" in said
    assert list(excerpts.files()) == list(range(1, 19))
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, 19))
    assert not (folder / "final").exists()
    assert audit(folder)["dropped"]["rolled_back"] >= 2
    with LocalRun(config) as run:
        run.finish()
    report = audit(folder)
    assert report["violations"] == []
    assert report["steps"] == NUM_STEPS
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
    assert excerpts.path_of(18).read_bytes() == kept
    assert excerpts.path_of(19).read_bytes() != undone


def test_a_run_is_not_made_shorter_than_it_is_and_loses_nothing_by_the_attempt(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path, tiny_model, algorithm={"preset": "sft"}, eval={"every_steps": 0},
        learner={"num_steps": 3, "num_threads": 1},
    )  # fmt: skip
    import_experts(config)
    run_module("learner", "--config", str(config))
    folder = tmp_path / "run"
    before = {path: path.read_bytes() for path in [*(folder / "final").iterdir(), folder / "config.toml"]}
    refused = run_module("learner", "--config", str(config), "learner.num_steps=2", check=False)
    assert refused.returncode == 2
    line = refused.stderr.splitlines()[-1]
    assert line.startswith("chord-learner: learner.num_steps: got 2, expected at least the 3 steps that"), line
    assert {path: path.read_bytes() for path in before} == before
    report = audit(folder)
    assert (report["steps"], report["violations"]) == (3, [])


def test_a_recipe_that_is_refused_is_not_taken_for_that_of_the_run(
    killed_twice: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config = copy_of(killed_twice, tmp_path, tiny_model)
    folder = tmp_path / "run"
    shutil.rmtree(folder / "checkpoints" / f"step-{NUM_STEPS:08d}")  # two steps are to be taken again
    record = (folder / "config.toml").read_bytes()
    more = f"learner.num_steps={NUM_STEPS + 2}"  # a complete run is not started
    refused = run_module("common.local", "--config", str(config), "learner.lr=0.5", more, check=False)
    assert refused.returncode == 2
    assert "learner.lr: got 0.5, expected 0.0001 until the 2 steps after" in refused.stderr.splitlines()[-1]
    assert (folder / "config.toml").read_bytes() == record


def test_a_fresh_start_leaves_nothing_of_a_run(killed_twice: Path, tmp_path: Path) -> None:
    shutil.copytree(killed_twice, tmp_path / "run")
    RunDir(tmp_path / "run").clear(named={})
    assert list((tmp_path / "run").iterdir()) == []


def test_an_audit_names_what_does_not_add_up(killed_twice: Path, tiny_model: Path, tmp_path: Path) -> None:
    copy_of(killed_twice, tmp_path, tiny_model)
    folder = tmp_path / "run"
    assert audit(folder)["violations"] == []
    table = run_module("learner.audit", str(folder)).stdout
    assert "every lease and trajectory is accounted for" in table
    first, second, *others = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(first + second.replace('"reward_mean"', '"reward_mean "') + "".join(others))
    assert audit(folder)["violations"] == ["metrics.jsonl: its 20 lines are not the 20 of the ledger"]
    with sqlite3.connect(folder / "ledger.sqlite") as ledger:
        ledger.create_function("row_digest", -1, lambda *_: b"forged", deterministic=True)
        ledger.execute("UPDATE groups SET min_version = 9 WHERE group_id = 1")
    named = run_module("learner.audit", str(folder), check=False)
    assert named.returncode == 2
    assert "ledger.sqlite: is damaged" in named.stderr
