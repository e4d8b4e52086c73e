"""Run directories made up for tests of the report: as a learner leaves them, without one.

The text of its answers has letters of several bytes, which the tiny tokenizer cuts into one token each, and what would
end a script if it stood in a page as it is.
"""

import json
import math
from pathlib import Path

import numpy as np

from common.chat import Chat, ChatMessage
from common.config.load import resolve_config, to_toml_document
from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from learner.batch import BranchValues
from learner.excerpts.excerpts import Excerpts
from learner.excerpts.folder import ExcerptFolder
from learner.ledger.history import Composition
from learner.rows import Row, expert_row, policy_row
from learner.step_rows import StepRows

PLACES = ("Zürich", "Łódź", "São Paulo", "東京", "Αθήνα", "</script><b>")
GROUP_SIZE = 8


def make_run(folder: Path, model: Path, *, num_steps: int, groups_per_step: int = 2, seed: int = 0) -> Path:
    """A run of `num_steps` steps that was stopped before its end; its reward rises."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"model.path={model}", f"learner.num_steps={num_steps + 1}", f"run.seed={seed}"]
    overrides += ["algorithm.preset=chord_phi", f"run.dir={folder}", f"run.excerpt_groups_per_step={groups_per_step}"]
    (folder / "config.toml").write_text(to_toml_document(resolve_config(None, overrides).config))
    lines = [_line(step, num_steps, seed) for step in range(1, num_steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [_evaluation(step, num_steps) for step in range(0, num_steps + 1, max(num_steps // 4, 1))]
    (folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    excerpts = Excerpts(ExcerptFolder(folder / "excerpts"), groups_per_step=groups_per_step, seed=seed)
    chat, numbers = Chat(model), np.random.default_rng(seed)
    for step in range(num_steps):
        rows, logprobs = make_rows(chat, numbers, step, num_groups=groups_per_step)
        excerpts.add(rows, logprobs, ["actor-0"] * groups_per_step)
    return folder


def make_rows(chat: Chat, numbers: np.random.Generator, step: int, *, num_groups: int) -> tuple[StepRows, BranchValues]:
    """Groups and as many demonstrations, and the policy's log-probs of them."""
    groups = tuple(_group(chat, numbers, step, step * num_groups + n) for n in range(num_groups))
    rows: list[Row] = []
    for group in groups:
        rewards = np.array([trajectory.reward for trajectory in group.trajectories])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        rows.append(policy_row(group, advantages.tolist(), temperature=1.0, aggregation="token_mean"))
    for n in range(num_groups):
        messages = [_question(n), ChatMessage(role="assistant", content=f"It is {PLACES[n % len(PLACES)]}.")]
        rows.append(expert_row(chat.demonstration(messages), aggregation="token_mean"))
    composition = Composition(step, tuple(range(1, num_groups + 1)), tuple(range(1, num_groups + 1)), 0)
    logprobs = {
        branch: (
            np.log(numbers.uniform(0.05, 0.95, len(branch.tokens)))
            if branch.is_expert
            else np.minimum(branch.behavior_logprobs + 0.3 * numbers.normal(size=len(branch.tokens)), -0.001)
        ).astype(np.float32)
        for row in rows
        for branch in row.branches
    }
    return StepRows(composition, groups, rows, 0.1, num_groups), logprobs


def _question(number: int) -> ChatMessage:
    return ChatMessage(role="user", content=f"Question {number}: where does the train go?")


def _group(chat: Chat, numbers: np.random.Generator, step: int, number: int) -> TrajectoryGroup:
    prompt = chat.prompt_tokens([_question(number)])
    trajectories: list[Trajectory] = []
    for n in range(GROUP_SIZE):
        place = PLACES[int(numbers.integers(len(PLACES)))]
        said = f"I think that the train of step {step} goes to {place}, answer {n}."
        answer = chat.demonstration([_question(number), ChatMessage(role="assistant", content=said)]).tokens[
            len(prompt) :
        ]
        sampled = np.arange(len(prompt) + len(answer)) >= len(prompt)
        versions = np.where(np.arange(len(sampled)) > len(prompt) + 20, step, max(step - 1, 0))
        trajectories.append(
            Trajectory(
                np.array([*prompt, *answer], dtype=np.int32),
                np.where(sampled, np.log(numbers.uniform(0.2, 1.0, len(sampled))), 0.0).astype(np.float32),
                sampled.astype(np.float32),
                np.where(sampled, versions, NOT_SAMPLED).astype(np.int32),
                float(place == "Zürich"),
                is_truncated=bool(numbers.random() < 0.1),
            )
        )
    return TrajectoryGroup(f"lease-{number}", len(prompt), tuple(trajectories))


def _line(step: int, num_steps: int, seed: int) -> dict[str, object]:
    done = step / num_steps
    wave = 0.05 * math.sin(step + seed)
    return {
        "step": step, "mu": 0.9 - 0.8 * done, "mu_effective": 0.5 if step % 20 == 1 else None, "lr": 1e-6,
        "loss": 1 - done, "policy_loss": 0.1 * wave, "expert_loss": 1.5 - done + wave, "grad_norm": 2.0 + wave,
        "policy_entropy": 1.8 - done + wave, "policy_mismatch_kl": 0.01 + 0.1 * wave**2, "policy_ess_frac": 0.95 + wave,
        "policy_clip_frac": 0.0, "policy_cap_frac": 0.01, "policy_masked_frac": 0.0, "expert_phi_mean": 0.12 + wave / 5,
        "expert_p_lt_01_frac": 0.4 * (1 - done), "expert_p_gt_09_frac": 0.5 * done, "expert_nll_mean": 2 - done,
        "groups_with_signal_frac": 0.6 + wave, "truncated_frac": 0.1, "reward_mean": 0.6 * done + wave,
        "num_trajectories": 16, "staleness_mean": 0.8, "staleness_max": 1, "staleness_histogram": {"0": 2, "1": 4},
        "sampled_answer_tokens_mean": 60 + 10 * wave, "trained_answer_tokens_mean": 58 + 10 * wave,
        "learner_wait_frac": 0.2 + wave, "actor_idle_frac": 0.1, "actor_tokens_per_s": 900.0, "wait_s": 0.5,
        "learner_tokens_per_s": 700.0, "train_s": 2.0, "publish_s": 0.1, "weight_bytes_sent": 270_000_000 * step,
        "trajectory_bytes_received": 40_000 * step, "run_wall_s": 2.6 * step,
    }  # fmt: skip


def _evaluation(step: int, num_steps: int) -> dict[str, object]:
    accuracy = 0.1 + 0.5 * step / num_steps
    return {
        "step": step, "task": "places", "num_problems": 200, "num_correct": int(200 * accuracy), "accuracy": accuracy,
        "confidence_95": [accuracy - 0.06, accuracy + 0.06],
    }  # fmt: skip
