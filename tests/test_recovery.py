"""Recovery: whatever was killed, the history is the one that would have been; it can be repeated and taken back."""

import json
import sqlite3
from pathlib import Path

from learner.excerpts.folder import ExcerptFolder
from tests.runs import LocalRun, audit, import_experts, read_lines, read_summary, run_module, write_config


def write_simulated_config(folder: Path, model: Path, *, num_steps: int, tokens_per_s: float = 2000.0) -> Path:
    config = write_config(
        folder, model, run={"num_actors": 2}, actor={"engine": "simulated", "tokens_per_s": tokens_per_s},
        eval={"every_steps": 0},
        algorithm={"max_staleness": 2},
        learner={"num_steps": num_steps, "checkpoint_every_steps": 3, "keep_arrivals": True, "num_threads": 1},
    )  # fmt: skip
    import_experts(config)
    return config


def test_a_run_killed_twice_is_bit_for_bit_the_one_that_was_not(tiny_model: Path, tmp_path: Path) -> None:
    config = write_simulated_config(tmp_path, tiny_model, num_steps=20, tokens_per_s=30.0)
    with LocalRun(config) as run:
        for reached in (4, 8):
            run.wait_until(lambda reached=reached: run.num_steps_done() >= reached)
            run.kill("learner")
            done = run.num_steps_done()
            run.wait_until(lambda done=done: run.num_steps_done() > done)
            assert audit(run.folder)["violations"] == []  # while it goes on
        run.finish()
    assert read_summary(run.folder)["incarnations"] == 3
    report = audit(run.folder)
    assert report["violations"] == []
    assert (report["steps"], report["lost"], report["duplicates"]) == (20, 0, 0)
    assert list(ExcerptFolder(run.folder / "excerpts").files()) == list(range(1, 21))
    replayed = run_module("learner", "--replay", str(run.folder)).stdout
    assert "replayed steps 1 to 20: bit for bit, 20 versions" in replayed
    manifest = json.loads((run.folder / "checkpoints" / "step-00000020" / "manifest.json").read_text())
    assert replayed.strip().endswith(manifest["parameters_hash"])


def test_a_run_with_sharded_parameters_is_bit_for_bit_the_one_that_was_not_killed(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = write_simulated_config(tmp_path, tiny_model, num_steps=6, tokens_per_s=30.0)
    with LocalRun(config, "learner.zero_stage=3") as run:
        run.wait_until(lambda: run.num_steps_done() >= 4)
        run.kill("learner")
        run.finish()
    assert read_summary(run.folder)["incarnations"] == 2
    assert audit(run.folder)["violations"] == []
    replayed = run_module("learner", "--replay", str(run.folder)).stdout
    assert "replayed steps 1 to 6: bit for bit, 6 versions and the parameters of checkpoints [3, 6]" in replayed


def test_a_run_is_taken_back_and_goes_on_otherwise(tiny_model: Path, tmp_path: Path) -> None:
    config = write_simulated_config(tmp_path, tiny_model, num_steps=7)
    with LocalRun(config) as run:
        run.finish()
    refused = run_module("learner", "--config", str(config), "--rewind", "5", check=False)
    assert refused.returncode == 2
    assert "got step 5, expected 0 or one with a good checkpoint: [6, 7]" in refused.stderr
    excerpts = ExcerptFolder(run.folder / "excerpts")
    undone, kept = excerpts.path_of(7).read_bytes(), excerpts.path_of(6).read_bytes()
    said = run_module("learner", "--config", str(config), "--rewind", "6").stdout
    assert "is back at step 6:" in said
    assert list(excerpts.files()) == list(range(1, 7))
    assert [line["step"] for line in read_lines(run.folder / "metrics.jsonl")] == list(range(1, 7))
    assert not (run.folder / "final").exists()
    assert audit(run.folder)["dropped"]["rolled_back"] >= 2
    with LocalRun(config) as run:
        run.finish()
    report = audit(run.folder)
    assert report["violations"] == []
    assert report["steps"] == 7
    assert [line["step"] for line in read_lines(run.folder / "metrics.jsonl")] == list(range(1, 8))
    assert excerpts.path_of(6).read_bytes() == kept
    assert excerpts.path_of(7).read_bytes() != undone


def test_an_audit_names_what_does_not_add_up(tiny_model: Path, tmp_path: Path) -> None:
    config = write_simulated_config(tmp_path, tiny_model, num_steps=3)
    with LocalRun(config) as run:
        run.finish()
    assert audit(run.folder)["violations"] == []
    table = run_module("learner.audit", str(run.folder)).stdout
    assert "every lease and trajectory is accounted for" in table
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "metrics.jsonl").write_text(lines[0] + lines[1].replace('"reward_mean"', '"reward_mean "') + lines[2])
    assert any(
        "metrics.jsonl: its 3 lines are not the 3 of the ledger" in fault for fault in audit(run.folder)["violations"]
    )
    with sqlite3.connect(run.folder / "ledger.sqlite") as ledger:
        ledger.create_function("row_digest", -1, lambda *_: b"forged", deterministic=True)
        ledger.execute("UPDATE groups SET min_version = 9 WHERE group_id = 1")
    named = run_module("learner.audit", str(run.folder), check=False)
    assert named.returncode == 2
    assert "ledger.sqlite: is damaged" in named.stderr
