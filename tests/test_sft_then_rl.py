"""SFT-then-RL in one run: what becomes of optimizer, lr, version and leases where the one ends and the other begins."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq
from safetensors.torch import load_file, save_file

from common.config.load import resolve_config
from common.errors import OperatorError
from common.run_dir import RunDir
from common.version import Version
from common.weights.server import WeightServer
from common.weights.snapshot import write_snapshot
from common.wire.messages import EvaluationResult, Outcome, TaskScore
from common.wire.sockets import SocketLimits
from learner.audit.audit import audit as run_audit
from learner.handover import Choice, Handover, kept_policy, require_kept_policy
from learner.ledger.ledger import Ledger
from learner.publisher import Publisher
from learner.ranks import Ranks
from learner.recorder import Recorder
from learner.trainer import Trainer
from tests.installed import install_environment
from tests.runs import (
    PATIENCE_S,
    QUIET,
    LocalRun,
    audit,
    import_experts,
    read_lines,
    read_summary,
    run_module,
    write_config,
)
from tests.steps import CPU, some_rows

SFT_STEPS, NUM_STEPS, NUM_PROBLEMS = 4, 8, 4


def write_two_phases(folder: Path, model: Path, **algorithm: object) -> Path:
    config = write_config(
        folder, model, run={"num_actors": 1}, actor={"engine": "simulated"},
        eval={"every_steps": 2, "num_problems": NUM_PROBLEMS},
        algorithm={"preset": "sft_then_rl", "max_staleness": 1, **algorithm},
        learner={
            "num_steps": NUM_STEPS, "checkpoint_every_steps": 3, "keep_arrivals": True, "num_threads": 1,
            "lr": 1e-3, "lr_after_sft": 1e-4, "lr_warmup_steps": 2, "lr_schedule": "linear",
        },
    )  # fmt: skip
    import_experts(config)
    return config


def ledger_rows(folder: Path, query: str) -> list[tuple[object, ...]]:
    with sqlite3.connect(f"file:{folder / 'ledger.sqlite'}?mode=ro", uri=True) as ledger:
        return ledger.execute(query).fetchall()


@pytest.fixture(scope="module")
def two_phases(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in its first phase and again in its second; sft_steps is half of the run."""
    config = write_two_phases(tmp_path_factory.mktemp("two"), tiny_model)
    slowly = ["expert.rows_per_step=40", "learner.micro_batch_tokens=64", "actor.tokens_per_s=20"]
    with LocalRun(config, *slowly) as run:
        for reached in (2, SFT_STEPS + 1):
            run.wait_until(lambda reached=reached: run.num_steps_done() >= reached)
            run.kill("learner")
        run.finish()
    assert read_summary(run.folder)["incarnations"] == 3
    return run.folder


def test_mu_is_one_until_the_switch_and_zero_after_it(two_phases: Path) -> None:
    lines = read_lines(two_phases / "metrics.jsonl")
    assert [line["mu"] for line in lines] == [1.0] * SFT_STEPS + [0.0] * (NUM_STEPS - SFT_STEPS)
    assert [bool(line["num_expert_tokens"]) for line in lines] == [True] * SFT_STEPS + [False] * 4
    assert [bool(line["num_policy_tokens"]) for line in lines] == [False] * SFT_STEPS + [True] * 4


def test_the_schedule_of_lr_begins_anew_at_the_switch(two_phases: Path) -> None:
    lr = [line["lr"] for line in read_lines(two_phases / "metrics.jsonl")]
    shape = [0.5, 1.0, 1.0, 0.5]  # two steps of warm-up, then down to 0
    assert lr == pytest.approx([1e-3 * x for x in shape] + [1e-4 * x for x in shape])


def test_nothing_is_leased_before_the_switch_and_all_of_it_is_trained_after_it(two_phases: Path) -> None:
    (least,) = ledger_rows(two_phases, "SELECT min(min_version) FROM groups")
    assert least == (SFT_STEPS,)
    steps = ledger_rows(two_phases, "SELECT step, count(*) FROM groups WHERE state = 'trained' GROUP BY step")
    assert steps == [(step, 2) for step in range(SFT_STEPS, NUM_STEPS)]
    report = audit(two_phases)
    assert (report["violations"], report["lost"], report["duplicates"]) == ([], 0, 0)


def test_a_run_without_a_supervised_phase_keeps_no_policy_aside(tmp_path: Path) -> None:
    config = resolve_config(None, ["model.path=m", f"run.dir={tmp_path}", "algorithm.preset=grpo"]).config
    ledger = Ledger(tmp_path / "ledger.sqlite", groups_per_step=1, max_staleness=1)
    tensors = {"x": torch.zeros(4)}
    snapshot = write_snapshot(
        tensors, tmp_path / "0.safetensors", run_id="", incarnation=0, step=0, chunk_bytes=1 << 20
    )
    Handover(config, ledger).keep(snapshot)
    ledger.close()
    assert not (tmp_path / "sft").exists()


def result_of(version: Version, num_correct: int) -> EvaluationResult:
    """Of ten problems."""
    score = TaskScore(
        task="sums", num_problems=10, samples_per_problem=1, num_correct=num_correct, num_unparsed=0, num_truncated=0,
        confidence_95=(0.0, 1.0), pass_at_k={"1": num_correct / 10}, categories={}, mean_score=num_correct / 10,
        mean_answer_tokens=3.0, wall_s=0.5,
    )  # fmt: skip
    return EvaluationResult(version=version, scores=(score,))


class Phase:
    """A supervised phase of ten steps whose best policy goes on, as far as its publisher goes."""

    def __init__(self, folder: Path) -> None:
        keys = ["learner.num_steps=20", "eval.every_steps=1", "algorithm.sft_ends_with=best", f"run.dir={folder}"]
        config = resolve_config(None, ["model.path=m", "algorithm.preset=sft_then_rl", *keys]).config
        self.folder, self.config = folder, config
        self.ledger = Ledger(folder / "ledger.sqlite", groups_per_step=1, max_staleness=1)
        self.server = WeightServer(zmq.Context.instance(), host="127.0.0.1", port=0, limits=SocketLimits(1, 4, 1 << 20))
        self.handover = Handover(config, self.ledger)
        self.publisher = Publisher(
            folder / "weights", self.server, self.ledger, Recorder(folder, self.ledger), every_steps=1,
            last_steps={config.sft_steps}, chunk_bytes=1 << 20, timeout_s=60, keep=self.handover.keep,
        )  # fmt: skip

    def publish(self, steps: range, *, off_by: float = 0.0) -> None:
        """`off_by`: where a machine does not compute the same step alike twice."""
        for step in steps:
            self.publisher.publish({"x": torch.full((4,), step + off_by)}, step)
            self.publisher.settle()

    def hand_over(self, chosen: int) -> None:
        """Publish the chosen policy in the place of the last."""
        step = self.config.sft_steps
        self.publisher.publish(load_file(kept_policy(self.config, chosen)), step, replaces=True)
        self.publisher.settle()

    def start_again(self) -> "Phase":
        self.close()
        return Phase(self.folder)

    def evaluate(self, *num_correct: int) -> None:
        """Of ten problems, by the oldest versions that are owed."""
        for right in num_correct:
            version = self.publisher.evaluation()
            assert version
            self.publisher.finish_evaluation(result_of(version, right))

    def kept(self) -> list[int]:
        return sorted(int(path.stem) for path in (self.folder / "sft").iterdir())

    def close(self) -> None:
        self.publisher.close()
        self.server.close()
        self.ledger.close()


@pytest.fixture
def phase(tmp_path: Path) -> Iterator[Phase]:
    begun = Phase(tmp_path)
    yield begun
    begun.close()


def test_a_policy_that_is_not_evaluated_is_not_kept_until_the_phase_ends(phase: Phase) -> None:
    phase.publish(range(10))
    assert phase.publisher.owed_steps == [0, 1, 2]
    assert phase.kept() == [1, 2, 9], "expected those that are owed, and the newest"
    phase.publish(range(10, 11))
    assert phase.kept() == [1, 2, 10], "expected the last of the phase, which is evaluated in any case"


def test_the_best_so_far_is_kept_with_those_whose_evaluation_is_owed(phase: Phase) -> None:
    phase.publish(range(3))
    phase.evaluate(9, 5, 3)
    phase.publish(range(3, 7))
    assert phase.publisher.owed_steps == [3, 4, 5]
    assert phase.kept() == [1, 3, 4, 5, 6]
    phase.evaluate(5, 2)
    phase.publish(range(7, 8))
    assert phase.kept() == [3, 5, 7], "expected the later of two that are equally good"


def test_the_chosen_policy_is_the_one_that_was_kept_though_a_replay_gives_its_version_other_bits(phase: Phase) -> None:
    phase.publish(range(11))
    phase.evaluate(1, 9, 3)
    assert phase.handover.choose(phase.publisher.settle()) == 1
    phase.publish(range(3), off_by=0.5)
    choice, history = phase.handover.choice, phase.ledger.history
    assert choice
    kept = require_kept_policy(phase.config, choice, history)
    assert load_file(kept)["x"].tolist() == [1.0] * 4
    of_an_older_run = replace(choice, chosen_hash="")
    assert require_kept_policy(phase.config, of_an_older_run, history) == kept
    kept.write_bytes(kept.read_bytes()[:-1] + b"!")
    for one in (choice, of_an_older_run):
        with pytest.raises(OperatorError, match=r"00000001\.safetensors: got .* expected version 1 with hash"):
            require_kept_policy(phase.config, one, history)


def test_a_choice_of_an_older_run_is_read() -> None:
    assert Choice.read('{"step": 10, "hash": "aa", "chosen": 4}') == Choice(10, "aa", 4)


@pytest.mark.parametrize("is_killed_before", [False, True], ids=["goes on", "is killed before the chosen is published"])
def test_the_last_policy_s_late_evaluation_is_left_out_where_another_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, is_killed_before: bool
) -> None:
    phase = Phase(tmp_path)
    phase.publish(range(11))
    phase.evaluate(1, 9, 3)
    late = phase.publisher.evaluation()
    assert late
    assert late.step == phase.config.sft_steps
    assert phase.handover.choose(phase.publisher.settle()) == 1
    if is_killed_before:
        phase = phase.start_again()
        assert phase.publisher.owed_steps == [late.step]
    phase.hand_over(1)
    assert (phase.publisher.owed_steps, phase.publisher.evaluation(), phase.server.num_pinned) == ([], None, 0)
    assert caplog.text.count("which was not evaluated in time and will not be") == 1
    for _ in range(2):  # after a kill the step is replayed, or begins that start
        assert phase.publisher.finish_evaluation(result_of(late, 10)) is Outcome.REDELIVERED
        phase = phase.start_again()
        assert phase.publisher.owed_steps == []
        phase.hand_over(1)
        assert phase.publisher.owed_steps == []
        phase = phase.start_again()
        phase.publisher.publish(load_file(kept_policy(phase.config, 1)), late.step)
        phase.publisher.settle()
        assert phase.publisher.owed_steps == []
    assert [line["step"] for line in read_lines(tmp_path / "eval.jsonl")] == [0, 1, 2]
    assert run_audit(RunDir(tmp_path)).violations == []
    phase.close()


def test_the_last_policy_s_evaluation_counts_where_it_came_in_time_or_before_the_chosen_was_published(
    phase: Phase,
) -> None:
    phase.publish(range(11))
    phase.evaluate(1, 9, 3)
    phase.handover.choose(phase.publisher.settle())
    phase.evaluate(4)
    phase.hand_over(1)
    assert [(line["step"], line["accuracy"]) for line in read_lines(phase.folder / "eval.jsonl")][-1] == (10, 0.4)
    assert run_audit(RunDir(phase.folder)).violations == []


def test_the_last_policy_is_evaluated_where_it_is_the_one_that_goes_on(phase: Phase) -> None:
    phase.publish(range(11))
    phase.evaluate(1, 3, 3, 9)
    assert phase.handover.choose(phase.publisher.settle()) == phase.config.sft_steps
    phase.hand_over(phase.config.sft_steps)
    assert [line["step"] for line in read_lines(phase.folder / "eval.jsonl")] == [0, 1, 2, 10]
    assert run_audit(RunDir(phase.folder)).violations == []


def start_learner_and_stop_it_once(
    is_reached: Callable[[dict[str, Any]], bool], config: Path, *overrides: str, packages: str = ""
) -> tuple[int, str]:
    """A learner alone, to which SIGTERM is sent once its status.json says so; its exit code, and what it said."""
    path = os.pathsep.join([packages, os.getcwd()]).strip(os.pathsep)
    command = [sys.executable, "-m", "learner", "--config", str(config), *overrides]
    log, status = config.parent / "learner.log", config.parent / "run" / "status.json"
    with log.open("wb") as stderr:
        learner = subprocess.Popen(command, stderr=stderr, env={**os.environ, **QUIET, "PYTHONPATH": path})
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (status.exists() and is_reached(json.loads(status.read_text()))):
            assert learner.poll() is None, log.read_text()
            assert time.monotonic() < deadline, status.read_text()
            time.sleep(0.05)
        learner.terminate()
        return learner.wait(PATIENCE_S), log.read_text()
    finally:
        learner.kill()
        learner.wait()


def test_both_phases_are_repeated_bit_for_bit(two_phases: Path) -> None:
    replayed = run_module("learner", "--replay", str(two_phases)).stdout
    assert f"replayed steps 1 to {NUM_STEPS}: bit for bit, {NUM_STEPS} versions" in replayed


def test_a_rewind_to_before_the_switch_forgets_who_went_on_whatever_configuration_it_is_told(
    two_phases: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_phases, folder)
    chosen = "SELECT value FROM facts WHERE name = 'handover'"
    ((before,),) = ledger_rows(folder, chosen)
    assert json.loads(str(before))["step"] == SFT_STEPS
    run_module("learner", "--rewind", "0", f"run.dir={folder}")
    assert ledger_rows(folder, chosen) == [("",)]


def test_a_run_that_was_stopped_before_the_first_groups_of_its_second_phase_is_repeated_bit_for_bit(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = write_two_phases(tmp_path, tiny_model)
    waited_for = f"groups of step {SFT_STEPS + 1}"
    returncode, said = start_learner_and_stop_it_once(lambda status: waited_for in status["waiting_for"], config)
    assert returncode == 0, said
    replayed = run_module("learner", "--replay", str(tmp_path / "run")).stdout
    versions = f"{SFT_STEPS} versions and the parameters of checkpoints [3, {SFT_STEPS}]"
    assert f"replayed steps 1 to {SFT_STEPS}: bit for bit, {versions}" in replayed


def test_the_second_phase_begins_with_a_new_optimizer_on_the_published_weights(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = resolve_config(write_two_phases(tmp_path, tiny_model)).config
    ranks, rows = Ranks(CPU), some_rows()

    def after(weights: Path | None, *, num_earlier_steps: int) -> str:
        trainer = Trainer(config, ranks, CPU)
        for step in range(num_earlier_steps):
            trainer.take(step, rows, mu=1.0)
        if weights:
            if not weights.exists():
                save_file(trainer.published_tensors(), weights)
            trainer.begin_anew(weights)
        trainer.take(SFT_STEPS, rows, mu=0.0)
        return trainer.parameters_hash()

    weights = tmp_path / "weights.safetensors"
    in_one_run = after(weights, num_earlier_steps=SFT_STEPS)
    assert in_one_run == after(weights, num_earlier_steps=0)
    assert in_one_run != after(None, num_earlier_steps=SFT_STEPS)


FADING = f"""
from actors.environment import SingleTurn
from common.chat import ChatMessage

class Fading(SingleTurn):
    "Its held-out answers are right until versions 0 and {SFT_STEPS // 2} have been scored, whatever they say."
    num_scored = 0

    def __init__(self, *, seed, **options):
        pass

    def task(self, split, index):
        return split, [ChatMessage(role="user", content=f"{{split}} {{index}}")]

    def score(self, task, text):
        self.num_scored += task == "held_out"
        return float(self.num_scored <= 2 * {NUM_PROBLEMS})
"""


def test_a_best_policy_that_is_not_the_last_goes_on_though_the_run_was_stopped_while_it_was_chosen(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = write_two_phases(tmp_path, tiny_model, sft_ends_with="best")
    packages = install_environment(tmp_path / "packages", FADING, "fading = my_package:Fading")
    returncode, said = start_learner_and_stop_it_once(
        lambda status: status["phase"] == "evaluating", config, "environment.name=fading", packages=str(packages)
    )
    assert returncode == 0, said
    assert "Traceback" not in said
    with LocalRun(config, "environment.name=fading", extra_path=packages) as run:
        run.finish()
    evaluated = {line["step"]: line["accuracy"] for line in read_lines(run.folder / "eval.jsonl")}
    assert evaluated == {0: 1.0, 2: 1.0, 4: 0.0, 6: 0.0, 8: 0.0}
    hashes = dict(ledger_rows(run.folder, "SELECT step, hash FROM versions"))
    assert hashes[SFT_STEPS] == hashes[SFT_STEPS // 2]
    assert read_summary(run.folder)["groups_trained"] == 2 * (NUM_STEPS - SFT_STEPS)
    assert audit(run.folder)["violations"] == []


def test_the_best_policy_goes_on_where_that_is_wanted(tiny_model: Path, tmp_path: Path) -> None:
    config = write_two_phases(tmp_path, tiny_model, sft_ends_with="best")
    with LocalRun(config) as run:
        run.finish()
    (noted,) = ledger_rows(run.folder, "SELECT value FROM facts WHERE name = 'handover'")
    choice = json.loads(str(noted[0]))
    evaluated = {line["step"]: line["accuracy"] for line in read_lines(run.folder / "eval.jsonl")}
    of_sft = {step: accuracy for step, accuracy in evaluated.items() if 0 < step <= SFT_STEPS}
    assert 0 in evaluated, "expected an untrained policy that was not chosen"
    assert choice["chosen"] == max(of_sft, key=lambda step: (of_sft[step], step))
    assert [path.stem for path in (run.folder / "sft").iterdir()] == [f"{choice['chosen']:08d}"]
    hashes = dict(ledger_rows(run.folder, "SELECT step, hash FROM versions"))
    assert hashes[SFT_STEPS] == hashes[choice["chosen"]]
    assert audit(run.folder)["violations"] == []
    replayed = run_module("learner", "--replay", str(run.folder)).stdout
    assert f"replayed steps 1 to {NUM_STEPS}: bit for bit, {NUM_STEPS} versions" in replayed
