"""Excerpts: what a step leaves of itself for people is what it trained on, is bounded, and never changes."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from common.chat import Chat
from common.config.load import resolve_config
from common.trajectory import NOT_SAMPLED
from learner.excerpts.excerpts import Excerpts
from learner.excerpts.folder import MAX_STEPS, NEWEST_STEPS, ExcerptFolder
from learner.ranks import Ranks
from learner.trainer import Trainer
from tests.judge import Judge
from tests.report_runs import make_rows
from tests.steps import CPU, random_rows


def read(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


@pytest.mark.parametrize("override", ["learner.share_prompts=true", "learner.share_prompts=false"])
def test_a_step_brings_back_the_log_probs_of_every_branch_as_its_forward_found_them(
    tiny_model: Path, override: str
) -> None:
    overrides = [f"model.path={tiny_model}", "learner.micro_batch_tokens=40", "learner.lr=1.0", override]
    rows = random_rows(Judge(tiny_model), seed=5, num_groups=3, num_experts=4, spread=0.3, temperature=0.7)
    taken = Trainer(resolve_config(None, overrides).config, Ranks(CPU), CPU).take(0, rows, mu=0.3)
    branches = [(row, branch) for row in rows for branch in row.branches]
    assert taken.logprobs.keys() == {branch for _, branch in branches}
    judge = Judge(tiny_model)
    for row, branch in branches:
        expected = np.where(branch.mask > 0, judge.logprobs(row, branch)[0].detach().numpy(), 0.0)
        np.testing.assert_allclose(taken.logprobs[branch], expected, atol=1e-4)


def test_an_excerpt_holds_what_was_trained_on_and_nothing_that_was_not(tiny_model: Path, tmp_path: Path) -> None:
    rows, logprobs = make_rows(Chat(tiny_model), np.random.default_rng(3), 6, num_groups=3)
    folder = ExcerptFolder(tmp_path)
    Excerpts(folder, groups_per_step=2, seed=0).add(rows, logprobs, ["a", "b", "c"])
    found = read(folder.path_of(7))
    answers = [row for row in found if row["group_id"] is not None]
    assert len({row["group_id"] for row in answers}) == 2
    assert len(answers) == 2 * len(rows.groups[0].trajectories)
    for row in answers:
        n = row["group_id"] - 1
        trajectory, branch = rows.groups[n].trajectories[row["trajectory"]], rows.rows[n].branches[row["trajectory"]]
        assert (row["step"], row["actor_id"]) == (7, "abc"[n])
        assert row["prompt"] + row["tokens"] == trajectory.tokens.tolist()
        assert row["advantage"] == pytest.approx(branch.advantage)
        assert (row["reward"], row["is_truncated"]) == (trajectory.reward, trajectory.is_truncated)
        start = rows.groups[n].num_prompt_tokens
        assert row["versions"] == trajectory.versions[start:].tolist()
        is_sampled = trajectory.versions[start:] != NOT_SAMPLED
        np.testing.assert_array_equal(np.isfinite(row["behavior_logprobs"]), is_sampled)
        np.testing.assert_allclose(np.array(row["policy_logprobs"])[is_sampled], logprobs[branch][is_sampled])
    experts = [row for row in found if row["group_id"] is None]
    assert len({row["expert_row_id"] for row in experts}) == len(experts) == 2
    for row in experts:
        demonstration = rows.rows[len(rows.groups) + row["expert_row_id"] - 1]
        assert row["prompt"] == demonstration.prompt.tolist()
        assert row["tokens"] == demonstration.branches[0].tokens.tolist()
        assert row["reward"] is row["advantage"] is row["versions"] is row["behavior_logprobs"] is None


def test_a_step_that_is_replayed_keeps_its_first_excerpt_and_another_seed_draws_otherwise(
    tiny_model: Path, tmp_path: Path
) -> None:
    rows, logprobs = make_rows(Chat(tiny_model), np.random.default_rng(3), 6, num_groups=12)
    noisy = {branch: values - 0.01 for branch, values in logprobs.items()}
    actor_ids = ["a"] * 12
    for name, seed, found in (("once", 0, logprobs), ("once", 0, noisy), ("again", 0, logprobs), ("other", 1, noisy)):
        Excerpts(ExcerptFolder(tmp_path / name), groups_per_step=2, seed=seed).add(rows, found, actor_ids)
    once, again, other = (ExcerptFolder(tmp_path / name).path_of(7) for name in ("once", "again", "other"))
    assert once.read_bytes() == again.read_bytes()
    groups = [{row["group_id"] for row in read(path)} for path in (once, other)]
    assert groups[0] != groups[1]


def test_no_excerpts_are_written_where_none_are_wanted(tiny_model: Path, tmp_path: Path) -> None:
    rows, logprobs = make_rows(Chat(tiny_model), np.random.default_rng(3), 6, num_groups=1)
    Excerpts(ExcerptFolder(tmp_path / "none"), groups_per_step=0, seed=0).add(rows, logprobs, ["a"])
    assert not (tmp_path / "none").exists()


def test_however_long_a_run_its_excerpts_are_bounded_and_evenly_spread(tmp_path: Path) -> None:
    folder, most = ExcerptFolder(tmp_path), 0
    last = 5 * MAX_STEPS // 2
    for step in range(1, last + 1):
        folder.write(step, [{"step": step}])
        if step % 97 == 0 or step == last:
            most = max(most, len(folder.files()))
    steps = list(folder.files())
    assert MAX_STEPS / 2 <= most <= MAX_STEPS + NEWEST_STEPS
    assert steps[-NEWEST_STEPS:] == list(range(last - NEWEST_STEPS + 1, last + 1))
    gaps = np.diff([step for step in steps if step <= last - NEWEST_STEPS])
    assert set(gaps) == {4}
    assert not list(tmp_path.glob("*.partial"))


def test_a_rewind_takes_later_excerpts_away(tmp_path: Path) -> None:
    folder = ExcerptFolder(tmp_path)
    for step in range(1, 6):
        folder.write(step, [{"step": step}])
    folder.rewind(3)
    assert list(folder.files()) == [1, 2, 3]
    ExcerptFolder(tmp_path / "none").rewind(0)
