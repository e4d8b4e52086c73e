"""Methods as users choose them: every preset to its end from one word, and what becomes of rewards on the way."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.config.load import resolve_config
from common.config.presets import PRESETS
from common.errors import ConfigError
from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from learner.host import Host
from learner.ledger.ledger import DropReason, Ledger, Sample
from learner.metrics import GAUGES
from learner.objective.advantages import group_advantages
from learner.schedule import lr_of, mu_of
from learner.shaping import Shaping
from tests import reference
from tests.runs import LocalRun, audit, import_experts, read_lines, read_summary, run_module, write_config

MAX_TOKENS = 10

MU = {
    "sft": [1.0] * 4,
    "dft": [1.0] * 4,
    "grpo": [0.0] * 4,
    "sft_then_rl": [1.0, 1.0, 0.0, 0.0],
    "chord_mu": [0.05 + 0.85 * 0.5 * (1 + np.cos(np.pi * step / 200)) for step in range(4)],
    "chord_phi": [0.1] * 4,
}


REPORTED = {
    "policy_loss", "expert_loss", "mu", "mu_effective", "expert_phi_mean", "expert_p_lt_01_frac", "expert_p_gt_09_frac",
    "policy_ess_frac", "policy_masked_frac", "policy_clip_frac", "policy_mismatch_kl", "policy_entropy", "grad_norm",
    "staleness_histogram", "sampled_answer_tokens_mean", "trained_answer_tokens_mean",
}  # fmt: skip
"""What the paper's readers want to see of each step; Prometheus has it too."""


def test_prometheus_has_whatever_is_reported_of_a_step() -> None:
    assert REPORTED - {"staleness_histogram"} <= GAUGES.keys()  # that one is a histogram there


@pytest.mark.parametrize("preset", MU)
def test_every_preset_runs_to_its_end_from_one_word(preset: str, tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, tiny_model, actor={"engine": "simulated"}, eval={"every_steps": 0})
    import_experts(config)
    unneeded = ["expert.path=/nowhere"] if preset == "grpo" else []
    with LocalRun(config, f"algorithm.preset={preset}", *unneeded) as run:
        run.finish()
    lines = read_lines(run.folder / "metrics.jsonl")
    assert [line["mu"] for line in lines] == pytest.approx(MU[preset])
    assert [line["num_policy_tokens"] > 0 for line in lines] == [mu < 1 for mu in MU[preset]]
    assert [line["num_expert_tokens"] > 0 for line in lines] == [mu > 0 for mu in MU[preset]]
    assert_effective_mu(lines[0])
    assert_only_what_was_there_is_told(lines)
    assert [name for name in (*REPORTED, *GAUGES) if name not in lines[0]] == []
    report = audit(run.folder)
    assert (report["violations"], report["lost"], report["duplicates"]) == ([], 0, 0)
    assert read_summary(run.folder)["trajectories_trained"] == 4 * sum(mu < 1 for mu in MU[preset])
    assert (run.folder / "final" / "model.safetensors").exists()


def assert_effective_mu(line: dict[str, Any]) -> None:
    policy, expert = ((line[f"{half}_grad_norm"] or 0.0) for half in ("policy", "expert"))
    assert line["mu_effective"] == pytest.approx(reference.effective_mu(line["mu"], policy, expert))
    assert {0.0: 0.0, 1.0: 1.0}.get(line["mu"], line["mu_effective"]) == line["mu_effective"]
    assert (expert > 0) == (line["mu"] > 0)


def assert_only_what_was_there_is_told(lines: list[dict[str, Any]]) -> None:
    """A half without a token has no entropy, no loss and no φ: not 0 of them."""
    for line in lines:
        for half in ("policy", "expert"):
            told = [line[name] is not None for name in REPORTED if name.startswith(half)]
            assert told == [line[f"num_{half}_tokens"] > 0] * len(told), line


def test_dft_weighs_expert_tokens_by_their_probability_and_sft_does_not() -> None:
    weighting = {name: resolve_config(None, [f"algorithm.preset={name}"]).config.algorithm for name in MU}
    assert {name: found.expert_weighting for name, found in weighting.items()} == {
        "sft": "none", "dft": "is", "grpo": "none", "sft_then_rl": "none", "chord_mu": "none", "chord_phi": "phi",
    }  # fmt: skip


def test_check_prints_the_values_that_a_preset_stands_for() -> None:
    said = run_module("common.local", "--check", "algorithm.preset=chord_phi", "algorithm.mu_peak=0.2",
                      "algorithm.mu_valley=0.2").stdout  # fmt: skip
    lines = {line.split(" = ")[0]: line for line in said.splitlines()}
    assert lines["algorithm.expert_weighting"].split(" = ")[1].split("#")[0].strip() == '"phi"'
    assert lines["algorithm.expert_weighting"].endswith("# preset chord_phi")
    assert lines["algorithm.mu_peak"].endswith("# override")


def test_groups_without_a_signal_are_dropped_and_replaced_exactly(tiny_model: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, tiny_model, actor={"engine": "simulated"}, eval={"every_steps": 0},
        algorithm={"preset": "grpo", "zero_variance": "drop", "group_size": 8, "max_staleness": 2},
        sampling={"max_tokens": 16}, learner={"num_steps": 4},
        environment={"options": {"family": "chain_sum", "min_terms": 2, "max_terms": 2, "max_digits": 1}},
    )  # fmt: skip  # random tokens hit such a sum now and then
    with LocalRun(config) as run:
        run.finish()
    lines = read_lines(run.folder / "metrics.jsonl")
    assert [(line["num_groups"], line["groups_with_signal_frac"]) for line in lines] == [(2, 1.0)] * 4
    report = audit(run.folder)
    assert report["dropped"]["zero_variance"] > 0
    assert (report["violations"], report["lost"]) == ([], 0)
    assert read_summary(run.folder)["max_staleness_trained"] <= 2


# Rewards


def group(rewards: list[float], lengths: list[int]) -> TrajectoryGroup:
    """Answers of so many tokens; those of MAX_TOKENS were cut off."""

    def trajectory(reward: float, length: int) -> Trajectory:
        sampled = np.arange(length + 1) > 0
        return Trajectory(
            tokens=np.ones(length + 1, dtype=np.int32),
            logprobs=np.where(sampled, -1.0, 0.0).astype(np.float32),
            mask=sampled.astype(np.float32),
            versions=np.where(sampled, 0, NOT_SAMPLED).astype(np.int32),
            reward=reward,
            is_truncated=length >= MAX_TOKENS,
        )

    return TrajectoryGroup("1", 1, tuple(map(trajectory, rewards, lengths)))


def advantages(overlong: Any, rewards: list[float], lengths: list[int]) -> list[float]:
    shaping = Shaping(scale="none", overlong=overlong, max_tokens=MAX_TOKENS, buffer_tokens=4)
    return shaping.advantages(group(rewards, lengths)).tolist()


def test_overlong_answers_keep_their_reward_unless_told_otherwise() -> None:
    assert advantages("keep", [1.0, 0.0], [3, 10]) == [0.5, -0.5]


def test_the_penalty_is_minus_1_whatever_an_overlong_answer_was_scored() -> None:
    assert advantages("penalty", [1.0, 1.0], [3, 10]) == [1.0, -1.0]


def test_a_masked_answer_has_no_gradient_and_leaves_the_others_as_they_are() -> None:
    assert advantages("mask", [1.0, 0.0, 0.5], [3, 10, 4]) == [0.5, 0.0, 0.0]


def test_the_soft_penalty_begins_below_the_limit() -> None:
    # Free up to 6 tokens, then a quarter for each further one; equation 13 of the DAPO paper.
    found = advantages("soft_penalty", [1.0, 1.0, 1.0, 1.0], [6, 7, 9, 10])
    assert found == pytest.approx((torch.tensor([1.0, 0.75, 0.25, 0.0]) - 0.5).tolist())


def test_the_soft_penalty_looks_at_the_last_answer_of_a_conversation() -> None:
    short = group([1.0], [6]).trajectories[0]
    versions = np.array([NOT_SAMPLED, *[0] * 9, NOT_SAMPLED, *[0] * 5], dtype=np.int32)
    long = Trajectory(versions + 2, versions * 0.0, versions * 0.0, versions, 1.0, is_truncated=False)
    assert (long.num_answer_tokens, long.num_last_answer_tokens) == (14, 5)
    shaping = Shaping(scale="none", overlong="soft_penalty", max_tokens=MAX_TOKENS, buffer_tokens=4)
    assert shaping.advantages(TrajectoryGroup("1", 1, (short, long))).tolist() == [0.0, 0.0]


def test_a_signal_is_an_advantage_other_than_0() -> None:
    for overlong, rewards, lengths, expected in [
        ("keep", [1.0, 1.0], [3, 10], False),
        ("penalty", [1.0, 1.0], [3, 10], True),
        ("mask", [0.5, 0.5], [3, 10], False),
        ("mask", [1.0, 0.0, 0.5], [10, 10, 4], False),
        ("keep", [1.0, 0.0], [3, 3], True),
    ]:
        shaping = Shaping(scale="std", overlong=overlong, max_tokens=MAX_TOKENS, buffer_tokens=4)  # pyright: ignore
        assert shaping.has_signal(group(rewards, lengths)) is expected, (overlong, rewards)


def test_without_shaping_advantages_are_those_of_the_paper() -> None:
    rewards = [1.0, 0.0, 0.0, -1.0]
    shaping = Shaping(scale="std", overlong="keep", max_tokens=MAX_TOKENS, buffer_tokens=0)
    found = shaping.advantages(group(rewards, [3, 10, 4, 5]))
    assert torch.equal(found, group_advantages(torch.tensor(rewards)))


# The ledger


def test_a_dropped_group_is_acknowledged_and_its_place_goes_to_another_prompt(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", groups_per_step=1, max_staleness=0)
    first = ledger.lease("a", "s", capacity=5, serving_step=0, held=())
    assert len(first) == 1
    sample = Sample(0, 2, 6, 0.0, 1.0)
    outcome, _ = ledger.commit(first[0].lease_id, b"body", sample, drop=DropReason.ZERO_VARIANCE)
    assert outcome == "committed"
    assert ledger.account.dropped() == {"zero_variance": 1}
    second = ledger.lease("a", "s", capacity=5, serving_step=0, held=())
    assert [lease.prompt_index for lease in second] == [1]
    ledger.close()


def test_nothing_is_leased_before_the_first_step_that_trains_on_groups(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", groups_per_step=2, max_staleness=1, num_steps=6, first_step=4)
    granted = [len(ledger.lease("a", f"s{step}", capacity=9, serving_step=step, held=())) for step in (0, 3, 4, 5)]
    assert granted == [0, 0, 4, 0]  # two steps' worth, as staleness 1 allows, which is all that 6 steps take
    ledger.close()


@pytest.mark.parametrize("preset", MU)
def test_prompts_are_leased_to_actors_only_where_groups_are_trained_on(
    preset: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Nobody would ever train on, or delete, what actors were let sample beside an `sft` run."""
    path = write_config(tmp_path, tiny_model, eval={"every_steps": 0})
    import_experts(path)
    host = Host(resolve_config(path, [f"algorithm.preset={preset}"]).config, on_wait=lambda: None)
    try:
        found = [host.ledger.lease("a", f"s{step}", capacity=9, serving_step=step, held=()) for step in range(4)]
    finally:
        host.close()
        host.watchdog.close()  # it guards a learner to the end of its process, which is pytest's here
    assert [step for step, granted in enumerate(found) if granted] == {"sft": [], "dft": [], "sft_then_rl": [2]}.get(
        preset, [0, 1, 2]
    )


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_a_step_that_is_not_finite_ends_the_run_and_leaves_nothing_of_itself(
    zero_stage: int, tiny_model: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path, tiny_model, eval={"every_steps": 0},
        learner={"lr": 1e30, "num_steps": 4, "zero_stage": zero_stage, "checkpoint_every_steps": 1},
    )  # fmt: skip
    import_experts(config)
    for _ in range(2):  # a new start takes the same step again
        ended = run_module("learner", "--config", str(config), "algorithm.preset=sft", check=False)
        assert ended.returncode == 2, ended.stderr
        told = r"chord-learner: step 2: got loss \S+ and gradient norm (nan|inf), expected finite .* lower learner\.lr"
        assert re.fullmatch(told, ended.stderr.splitlines()[-1]), ended.stderr
    folder = tmp_path / "run"
    assert [line["step"] for line in read_lines(folder / "metrics.jsonl")] == [1]
    assert [path.name for path in (folder / "checkpoints").iterdir() if path.is_dir()] == ["step-00000001"]
    assert not (folder / "final").exists()


# Configuration


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["algorithm.preset=chord"], ["algorithm.preset", 'got "chord"', "'sft_then_rl'"]),
        (["algorithm.correction=none"], ["algorithm.correction", 'got "none"', "allow_uncorrected"]),
        (["algorithm.group_size=1"], ["algorithm.group_size", "got 1"]),
        (["algorithm.mu_decay_steps=0"], ["algorithm.mu_decay_steps", "got 0 with mu_peak 0.9"]),
        (["expert.rows_per_step=0"], ["expert.rows_per_step", "got 0", "μ > 0"]),
        (["sampling.top_p=0.9"], ["sampling.top_p", "got 0.9", "eval.top_p"]),
        (["sampling.top_k=50"], ["sampling.top_k", "got 50", "eval.top_k"]),
        (["algorithm.preset=sft_then_rl", "learner.num_steps=1"], ["learner.num_steps", "got 1"]),
        (["algorithm.preset=sft_then_rl", "algorithm.sft_steps=0"], ["algorithm.sft_steps", "got 0"]),
        (["algorithm.sft_steps=100"], ["algorithm.sft_steps", "got 100", "learner.num_steps (100)"]),
        (["algorithm.preset=dft", "algorithm.mu_peak=0.5"], ["algorithm.mu_decay_steps", "got 0 with mu_peak 0.5"]),
        (["algorithm.correction=icepop", "algorithm.band=[2, 5]"], ["algorithm.band", "got [2.0, 5.0]", "ratio is 1"]),
        (["algorithm.band=[0.5, 1]"], ["algorithm.band", "got [0.5, 1.0]", "0 <= low < 1 < high"]),
        (["algorithm.band=[-1, 5]"], ["algorithm.band", "got [-1.0, 5.0]"]),
        (["algorithm.cap=0.5"], ["algorithm.cap", "got 0.5", "greater than or equal to 1"]),
        (
            ["algorithm.preset=grpo", "algorithm.sft_steps=5", "expert.rows_per_step=0"],
            ["expert.rows_per_step", "got 0 with algorithm.sft_steps 5"],
        ),
        (["algorithm.overlong=soft_penalty"], ["algorithm.overlong_buffer_tokens", "got 0"]),
        (
            ["algorithm.preset=sft_then_rl", "algorithm.sft_ends_with=best", "eval.every_steps=0"],
            ["eval.every_steps", "got 0"],
        ),
        (
            ["algorithm.sft_steps=12", "algorithm.sft_ends_with=best", "eval.every_steps=12"],
            ["eval.every_steps", "got 12", "expected 1 to 11"],
        ),
    ],
)
def test_what_would_train_something_else_than_it_says_is_refused(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        resolve_config(None, overrides)
    (line,) = refused.value.lines
    assert [word for word in words if word not in line] == [], line


@pytest.mark.parametrize("preset", PRESETS)
def test_any_value_of_a_preset_can_be_overridden(preset: str) -> None:
    own: dict[str, Any] = {
        "mu_peak": 0.4,
        "mu_valley": 0.2,
        "mu_warmup_steps": 3,
        "mu_decay_steps": 5,
        "mu_target": 0.9,
    }
    own |= {"expert_weighting": "phi", "sft_steps": 2}
    assert set(own) == set(PRESETS[preset])
    overrides = [f"algorithm.{key}={value}" for key, value in own.items()]
    algorithm = resolve_config(None, [f"algorithm.preset={preset}", *overrides]).config.algorithm
    assert algorithm.model_dump(include=set(own)) == own
    assert algorithm.trains_on_groups
    assert algorithm.trains_on_experts

    # What a run needs follows from the values, not from the word.
    mixed = [f"algorithm.preset={preset}", "algorithm.mu_peak=0.5", "algorithm.mu_valley=0.5", "expert.rows_per_step=0"]
    with pytest.raises(ConfigError, match=r"expert.rows_per_step: got 0"):
        resolve_config(None, mixed)


def test_uncorrected_training_is_allowed_where_it_is_asked_for() -> None:
    config = resolve_config(None, ["algorithm.correction=none", "algorithm.allow_uncorrected=true"]).config
    assert config.algorithm.max_staleness > 0


def test_schedules_begin_anew_after_the_supervised_steps() -> None:
    overrides = [
        "algorithm.preset=chord_mu", "algorithm.sft_steps=10", "learner.num_steps=310", "learner.lr=1e-5",
        "learner.lr_after_sft=1e-6", "learner.lr_schedule=linear",
    ]  # fmt: skip
    config = resolve_config(None, overrides).config
    assert [mu_of(config, step, mean_reward=0.0) for step in (9, 10, 210, 300)] == pytest.approx([1.0, 0.9, 0.05, 0.05])
    assert [lr_of(config, step) for step in (0, 5, 10, 160)] == pytest.approx([1e-5, 0.5e-5, 1e-6, 0.5e-6])


def test_a_preset_in_the_saved_configuration_means_the_same_again(tmp_path: Path) -> None:
    from common.config.load import to_toml_document

    for preset in MU:
        config = resolve_config(None, [f"algorithm.preset={preset}"]).config
        path = tmp_path / f"{preset}.toml"
        path.write_text(to_toml_document(config))
        assert json.loads(resolve_config(path).config.model_dump_json()) == json.loads(config.model_dump_json())
