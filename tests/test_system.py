"""Whole runs of real processes: a learner, two actors and an evaluator with a tiny model over ZeroMQ."""

import re
import signal
import sqlite3
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoModelForCausalLM

from tests.runs import LocalRun, audit_groups, import_experts, read_lines, read_summary, run_module, write_config
from tests.tiny_model import reconfigure

SIMULATED = {"engine": "simulated", "tokens_per_s": 40.0}
"""Where it does not matter what is sampled: actors that start sooner, and steps that leave time to strike."""


def check_record(folder: Path, *, num_steps: int, max_staleness: int = 1) -> None:
    """What every finished run must have left behind, whatever befell it."""
    summary = read_summary(folder)
    assert summary["steps"] == num_steps
    assert summary["lost"] == 0
    assert summary["duplicates"] == 0
    assert summary["max_staleness_trained"] <= max_staleness
    assert 0 <= summary["learner_wait_frac"] <= 1
    assert 0 <= summary["actor_idle_frac"] <= 1
    lines = read_lines(folder / "metrics.jsonl")
    assert all(line["wait_s"] + line["train_s"] <= line["step_s"] for line in lines)
    assert [line["step"] for line in lines] == list(range(1, num_steps + 1))
    steps = [line["step"] for line in read_lines(folder / "eval.jsonl")]
    assert steps == sorted(set(steps))
    assert {0, num_steps} <= set(steps)
    trained = [group for group in audit_groups(folder) if group["state"] == "trained"]
    assert len(trained) == summary["groups_trained"] == num_steps * 2
    assert all(0 <= group["staleness"] <= max_staleness for group in trained)
    with sqlite3.connect(folder / "ledger.sqlite") as database:
        (num_bodies,) = database.execute("SELECT count(*) FROM batches").fetchone()
    assert num_bodies == num_steps


def test_a_run_trains_evaluates_exports_and_leaves_no_process_behind(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model, learner={"num_steps": 80}, eval={"every_steps": 40})
    import_experts(config)
    with LocalRun(config) as run:
        run.wait_until(lambda: len(run.components()) == 4)
        started = list(run.components().values())
        run.finish()
    assert not [process for process in started if psutil.pid_exists(process.pid)]
    check_record(run.folder, num_steps=80)
    first = read_lines(run.folder / "metrics.jsonl")[0]
    assert first["num_expert_rows"] == 3
    assert first["mu"] == pytest.approx(0.1)
    assert set(read_summary(run.folder)["groups_by_actor"]) == {"actor-0", "actor-1"}
    final = AutoModelForCausalLM.from_pretrained(run.folder / "final", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    changed = [not torch.equal(a, b) for a, b in zip(final.parameters(), before.parameters(), strict=True)]
    assert any(changed)


def test_killing_an_actor_changes_nothing_but_the_time(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model, actor=SIMULATED, learner={"num_steps": 6})
    import_experts(config)
    with LocalRun(config) as run:
        run.wait_until(lambda: run.num_steps_done() >= 1)
        run.kill("actor-0")
        run.finish()
    assert "actor-0 ended with signal SIGKILL: starting it again" in run.output
    check_record(run.folder, num_steps=6)


def test_a_killed_learner_goes_on_where_it_was(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, run={"num_actors": 1}, actor=SIMULATED,
        learner={"num_steps": 7, "checkpoint_every_steps": 2},
    )  # fmt: skip
    import_experts(config)
    with LocalRun(config) as run:
        run.wait_until(lambda: run.num_steps_done() >= 3)
        run.kill("learner")
        run.finish()
    check_record(run.folder, num_steps=7)
    assert read_summary(run.folder)["incarnations"] == 2


def test_ctrl_c_writes_a_checkpoint_and_the_next_start_ends_the_run(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, run={"num_actors": 1}, actor=SIMULATED,
        learner={"num_steps": 1000, "checkpoint_every_steps": 500},
    )  # fmt: skip
    import_experts(config)
    with LocalRun(config) as run:
        run.wait_until(lambda: run.num_steps_done() >= 2)
        run.stop()
        run.finish()
    done = run.num_steps_done()
    assert 2 <= done < 1000
    assert (run.folder / "checkpoints" / f"step-{done:08d}").exists()
    with LocalRun(config, f"learner.num_steps={done + 2}") as run:
        run.finish()
    check_record(run.folder, num_steps=done + 2)


def test_max_staleness_zero_is_exactly_synchronous(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model, algorithm={"max_staleness": 0}, learner={"num_steps": 3})
    import_experts(config)
    with LocalRun(config) as run:
        run.finish()
    check_record(run.folder, num_steps=3, max_staleness=0)


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_two_ranks_train_a_run(tiny_model: Path, tmp_path: Path, zero_stage: int) -> None:
    ranks = {"num_ranks": 2, "zero_stage": zero_stage, "num_steps": 3, "num_threads": 1, "compute_dtype": "float32"}
    config = write_config(tmp_path, tiny_model, learner=ranks, actor={"num_threads": 1, "dtype": "float32"})
    import_experts(config)
    with LocalRun(config) as run:
        run.finish()
    check_record(run.folder, num_steps=3)
    check_excerpts(run.folder, num_steps=3)


def check_excerpts(folder: Path, *, num_steps: int) -> None:
    """Log-probs in training are those in sampling, whichever rank had the answer: in the first step, as later policies
    are published in fewer bits than they are trained in."""
    for step in range(1, num_steps + 1):
        rows = pq.read_table(folder / "excerpts" / f"step-{step:08d}.parquet").to_pylist()
        assert all((np.array(row["policy_logprobs"]) < 0).any() for row in rows)
        sampled = [row for row in rows if row["group_id"] is not None]
        assert len(sampled) == 4
        for row in sampled if step == 1 else ():
            np.testing.assert_allclose(row["policy_logprobs"], row["behavior_logprobs"], atol=1e-4)


def test_a_rank_that_meets_a_mistake_ends_the_learner_with_its_line(tiny_model: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, tiny_model, learner={"num_ranks": 2}))
    done = run_module("learner", "--config", config, "expert.path=/no/such/store", "network.port=5997", check=False)
    assert done.returncode == 2, done.stderr
    assert "/no/such/store: got no such file, expected an expert store" in done.stderr.splitlines()[-1]


def test_room_for_answers_past_the_models_window_is_refused_before_a_lease_is_granted(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = reconfigure(tiny_model, tmp_path / "mistral", model_type="mistral", sliding_window=64)
    done = run_module("learner", "--config", str(write_config(tmp_path, model)), check=False)
    assert done.returncode == 2, done.stderr
    assert "actor.max_model_tokens: got 256, expected at most 64 (sliding_window of" in done.stderr.splitlines()[-1]


def test_many_simulated_actors_feed_one_learner(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, run={"num_actors": 4}, actor={"engine": "simulated"}, eval={"every_steps": 0},
        algorithm={"max_staleness": 4}, learner={"num_steps": 8},
    )  # fmt: skip
    import_experts(config)
    with LocalRun(config) as run:
        run.finish()
    summary = read_summary(run.folder)
    assert summary["groups_trained"] == 16
    assert summary["lost"] == summary["duplicates"] == 0


def test_mistakes_end_with_one_line_and_exit_code_two(tiny_model: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, tiny_model))
    import_experts(Path(config))
    mistakes = {
        "model.path=/no/such/folder": "model.path: got '/no/such/folder', expected a Hugging Face folder",
        "expert.path=/no/such/store": "/no/such/store: got no such file, expected an expert store",
        "environment.name=nonesuch": "environment.name: got 'nonesuch', expected one of",
    }
    for override, expected in mistakes.items():
        module = "actors" if override.startswith("environment") else "learner"
        done = run_module(module, "--config", config, override, "network.port=5999", check=False)
        assert done.returncode == 2, done.stderr
        assert expected in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_busy_port_is_named_and_every_component_serves_metrics(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, actor=SIMULATED, eval={"every_steps": 1000}, learner={"num_steps": 100000}
    )
    import_experts(config)
    with LocalRun(config) as run:
        run.wait_until(lambda: run.num_steps_done() >= 1)
        names = ("learner", "actor-0", "actor-1", "evaluator")
        logs = {name: run.folder / "logs" / f"{name}.log" for name in names}
        run.wait_until(lambda: all("metrics: http" in log.read_text() for log in logs.values()))
        run.wait_until(lambda: scrape(logs["evaluator"])["chord_evaluations_total"] == 1)
        scraped = {name: scrape(log) for name, log in logs.items()}
        lines = (run.folder / "config.toml").read_text().splitlines()
        port = next(line.replace(" ", "") for line in lines if line.startswith("port = "))
        done = run_module(
            "learner", "--config", str(config), f"network.{port}", f"run.dir={tmp_path / 'b'}", check=False
        )
        other = run_module("learner", "--config", str(run.folder / "config.toml"), check=False)
        run.process.send_signal(signal.SIGTERM)
        run.finish()
    assert done.returncode == other.returncode == 2
    assert "network.port: cannot bind" in done.stderr.splitlines()[-1]
    assert "is in use by another learner" in other.stderr.splitlines()[-1]
    assert scraped["learner"]["chord_learner_step"] >= 1
    assert scraped["actor-0"]["chord_actor_tokens_total"] + scraped["actor-1"]["chord_actor_tokens_total"] > 0


def scrape(log: Path) -> dict[str, float]:
    """The metrics that the component of this log serves, by name."""
    found = re.search(r"metrics: (http://\S+)", log.read_text())
    assert found, log.read_text()[-2000:]
    with urllib.request.urlopen(found.group(1), timeout=10) as reply:
        text = reply.read().decode()
    return {sample.name: sample.value for family in text_string_to_metric_families(text) for sample in family.samples}
