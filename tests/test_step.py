"""One optimizer step: log-probs are the model's own, and the gradient is the same however the step is cut up."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import OperatorError
from learner.batch import TrainBatch, build_batch
from learner.objective.chord import chord_loss, expert_loss
from learner.objective.importance import Correction
from learner.objective.policy import policy_loss
from learner.policy_model import PolicyModel, load_policy_model
from learner.ranks import Ranks
from learner.rows import NOTHING, Branch, Row, deal, micro_batches, split_to_budget, unshare
from learner.shards import Sharding, check_offload, whole
from tests import reference
from tests.steps import (
    CPU,
    LR,
    MU,
    check_restores_to_the_bit,
    make_engine,
    sharding_of,
    some_rows,
    take_steps,
    weights_of,
    with_other_padding,
)
from tests.tiny_model import make_tiny_model, reconfigure

TOLERANCE = 2e-6


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(model_path: Path) -> PolicyModel:
    return load_policy_model(model_path, dtype=torch.float32, head_chunk_tokens=16)


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return Ranks(CPU)


def gradients(
    model: PolicyModel, micro_batches: list[TrainBatch], *, num_policy: float, num_expert: float
) -> dict[str, Tensor]:
    """The gradient of a whole step, summed over micro-batches."""
    model.zero_grad()
    for batch in micro_batches:
        logprobs, _ = model(batch)
        policy, _ = policy_loss(
            logprobs, batch.behavior_logprobs, batch.advantages, batch.policy_mask,
            correction=Correction(kind="tis"), num_tokens=num_policy,
        )  # fmt: skip
        expert, _ = expert_loss(logprobs, batch.expert_mask, weighting="phi", num_tokens=num_expert)
        chord_loss(policy, expert, mu=MU).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def token_counts(rows: list[Row]) -> dict[str, float]:
    batch = build_batch(rows)
    return {"num_policy": float(batch.policy_mask.sum()), "num_expert": float(batch.expert_mask.sum())}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = TOLERANCE) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(float(tensor.abs().max()) for tensor in theirs.values())
    worst = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert worst <= tolerance * max(scale, 1.0), f"differ by {worst} at scale {scale}"


def test_logprobs_are_the_models_own_at_the_rows_temperature(model: PolicyModel) -> None:
    for row in some_rows():
        batch = build_batch([row])
        ours, entropies = model(batch)
        for b, branch in enumerate(row.branches):
            tokens = np.concatenate([row.prompt, branch.tokens])
            logits = model.lm(input_ids=torch.from_numpy(tokens[None]).long()).logits[0].detach() / branch.temperature
            theirs = logits.log_softmax(-1)[torch.arange(len(row.prompt) - 1, len(tokens) - 1)]
            wanted = branch.mask > 0
            picked = theirs[torch.arange(len(branch.tokens)), torch.from_numpy(branch.tokens).long()]
            size = len(branch.tokens)
            torch.testing.assert_close(ours[b, :size][wanted], picked[wanted], atol=1e-4, rtol=0)
            entropy = -(theirs.exp() * theirs).sum(-1)
            torch.testing.assert_close(entropies[b, :size][wanted], entropy[wanted], atol=1e-4, rtol=0)
            assert not ours[b][batch.mask[b] == 0].any()


def test_vocabulary_logits_exist_for_loss_bearing_tokens_only_and_a_chunk_at_a_time(model: PolicyModel) -> None:
    batch, vocabulary = build_batch(some_rows()), model.lm.config.vocab_size
    with ProductSizes(vocabulary) as sizes:
        logprobs, _ = model(batch)
        assert sum(sizes.seen) == int((batch.mask > 0).sum())
        logprobs.sum().backward()
    assert max(sizes.seen) <= 16
    assert sum(sizes.seen) == 2 * int((batch.mask > 0).sum())


class ProductSizes(TorchDispatchMode):
    """Notes the rows of every matrix product that is so many columns wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self._width = width
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default and result.shape[1] == self._width:
            self.seen.append(result.shape[0])
        return result


@pytest.mark.parametrize("budget", [1, 40, 64, 150, 4096])
@pytest.mark.parametrize("shares_prompts", [True, False])
def test_the_gradient_is_the_same_for_every_split_into_micro_batches(
    model: PolicyModel, budget: int, shares_prompts: bool
) -> None:
    rows = some_rows()
    counts = token_counts(rows)
    whole = gradients(model, [build_batch(rows)], **counts)
    split = rows if shares_prompts else unshare(rows)
    parts = [part for row in split for part in split_to_budget(row, budget)]
    assert_close(gradients(model, [build_batch(some) for some in micro_batches(parts, budget)], **counts), whole)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(seed=st.integers(0, 2**32 - 1), budget=st.sampled_from([64, 500, 2000]), shares_prompts=st.booleans())
def test_neither_tokens_nor_padding_of_a_micro_batch_exceed_its_budget_but_for_a_single_branch(
    seed: int, budget: int, shares_prompts: bool
) -> None:
    numbers = np.random.default_rng(seed)
    sizes = [(int(numbers.choice([1, 8])), int(numbers.choice([5, 50, 500]))) for _ in range(20)]
    rows = [blank_row(numbers, num_branches, longest) for num_branches, longest in sizes]
    split = rows if shares_prompts else unshare(rows)
    batches = micro_batches([part for row in split for part in split_to_budget(row, budget)], budget)
    found = [id(branch) for some in batches for row in some for branch in row.branches]
    assert sorted(found) == sorted(id(branch) for row in rows for branch in row.branches)
    for some in batches:
        batch = build_batch(some)
        is_single = batch.branches.shape[0] == 1
        assert is_single or batch.tokens.numel() <= budget
        assert is_single or batch.prompts.numel() + batch.branches.numel() <= 2 * budget


def blank_row(numbers: np.random.Generator, num_branches: int, longest: int) -> Row:
    """Of one branch in four any length up to `longest`, of the others a tenth of it at most."""
    limits = [longest if numbers.random() < 0.25 else max(longest // 10, 1) for _ in range(num_branches)]
    (blank,) = NOTHING.branches
    branches = (replace(blank, tokens=np.zeros(numbers.integers(1, limit + 1), dtype=np.int32)) for limit in limits)
    return Row(np.zeros(numbers.integers(1, 60), dtype=np.int32), tuple(branches))


def test_rows_that_each_fit_the_models_window_train_together_and_one_that_does_not_is_refused(
    model: PolicyModel, model_path: Path, tmp_path: Path
) -> None:
    def row(num_prompt: int, num_answer: int) -> Row:
        numbers = np.random.default_rng(num_prompt)
        prompt, answer = (numbers.integers(0, 258, size).astype(np.int32) for size in (num_prompt, num_answer))
        ones = np.ones(num_answer, dtype=np.float32)
        return Row(prompt, (Branch(answer, ones, -ones, 1.0, 1.0, is_expert=False),))

    mistral = reconfigure(model_path, tmp_path / "mistral", model_type="mistral", sliding_window=64)
    windowed = load_policy_model(mistral, dtype=torch.float32, head_chunk_tokens=16)
    batch = build_batch([row(50, 14), row(5, 50)])
    assert batch.prompts.shape[1] + batch.branches.shape[1] == 100
    logprobs, _ = windowed(batch)
    logprobs.sum().backward()
    torch.testing.assert_close(logprobs, model(batch)[0])
    with pytest.raises(OperatorError, match="the last 64 tokens only and a row of 65,"):
        windowed(build_batch([row(50, 15), row(5, 50)]))


def test_recomputed_activations_give_the_same_gradient_and_are_not_kept(model_path: Path) -> None:
    def run(*, recompute_activations: bool) -> tuple[dict[str, Tensor], int]:
        model = load_policy_model(
            model_path, dtype=torch.float32, head_chunk_tokens=16, recompute_activations=recompute_activations
        )
        kept = list[int]()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            logprobs, _ = model(build_batch(some_rows()))
        logprobs.sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, sum(kept)

    plain, kept_bytes = run(recompute_activations=False)
    again, kept_again_bytes = run(recompute_activations=True)
    assert_close(again, plain, tolerance=1e-6)
    assert kept_again_bytes < 0.6 * kept_bytes


def test_the_gradient_does_not_depend_on_the_order_of_rows(model: PolicyModel) -> None:
    rows = some_rows()
    counts = token_counts(rows)
    forward = gradients(model, [build_batch(rows)], **counts)
    assert_close(gradients(model, [build_batch(rows[::-1])], **counts), forward)


def test_padding_and_masked_tokens_leave_no_trace(model: PolicyModel) -> None:
    rows = some_rows()
    counts = token_counts(rows)
    padded = gradients(model, [build_batch(rows)], **counts)
    otherwise = gradients(model, [with_other_padding(build_batch(rows), seed=1)], **counts)
    assert all(torch.isfinite(gradient).all() for gradient in padded.values())
    assert_close(otherwise, padded, tolerance=0.0)


def test_the_loss_of_a_step_is_the_papers(model: PolicyModel) -> None:
    rows = some_rows()
    counts = token_counts(rows)
    batch = build_batch(rows)
    logprobs, _ = model(batch)
    logprobs.retain_grad()
    policy, _ = policy_loss(
        logprobs, batch.behavior_logprobs, batch.advantages, batch.policy_mask,
        correction=Correction(kind="tis"), num_tokens=counts["num_policy"],
    )  # fmt: skip
    expert, _ = expert_loss(logprobs, batch.expert_mask, weighting="phi", num_tokens=counts["num_expert"])
    loss = chord_loss(policy, expert, mu=MU)
    loss.backward()
    slow_policy = reference.policy(
        logprobs.detach().double().numpy(), batch.behavior_logprobs.double().numpy(), batch.advantages.double().numpy(),
        batch.policy_mask.double().numpy(), counts["num_policy"], **vars(Correction(kind="tis")),
    )  # fmt: skip
    slow_expert = reference.expert(
        logprobs.detach().double().numpy(), batch.expert_mask.double().numpy(), "phi", counts["num_expert"]
    )
    slow_loss, by_policy, by_expert = reference.chord(slow_policy, slow_expert, MU)
    assert loss.item() == pytest.approx(slow_loss, abs=1e-5)
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad.numpy(), by_policy + by_expert, atol=1e-5)


def test_ranks_get_balanced_shares_and_every_row_once() -> None:
    rows = some_rows(num_groups=9, num_experts=11)
    shares = deal(rows, 3)
    assert sorted(id(row) for share in shares for row in share) == sorted(id(row) for row in rows)
    loads = [sum(row.num_tokens for row in share) for share in shares]
    assert max(loads) - min(loads) <= max(row.num_tokens for row in rows)


def test_zero_stages_and_splits_give_the_same_weights(model_path: Path, ranks: Ranks) -> None:
    expected = None
    for zero_stage, budget in [(0, 4096), (0, 64), (2, 4096), (2, 64), (3, 4096), (3, 64)]:
        engine = make_engine(model_path, ranks, sharding=sharding_of(zero_stage))
        report = take_steps(engine, ranks, some_rows(), budget=budget)
        weights = weights_of(engine)
        if expected is None:
            expected = (weights, report.metrics)
        assert_close(weights, expected[0], tolerance=1e-5)
        assert report.metrics == pytest.approx(expected[1], abs=1e-4)


def test_a_rank_without_rows_takes_part_in_the_step(model_path: Path, ranks: Ranks) -> None:
    engine = make_engine(model_path, ranks)
    before = weights_of(engine)
    report = engine.step([], mu=0.5, lr=1e-3)
    assert report.metrics["loss"] == 0.0
    assert_close(weights_of(engine), before, tolerance=0.0)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_measuring_the_halves_tells_their_gradients_and_leaves_no_trace(
    model_path: Path, ranks: Ranks, zero_stage: int
) -> None:
    batches = [build_batch([row]) for row in some_rows()]
    measured, plain = (make_engine(model_path, ranks, sharding=sharding_of(zero_stage)) for _ in range(2))
    report = measured.step(batches, mu=MU, lr=LR, measures_halves=True)
    plain.step(batches, mu=MU, lr=LR)
    assert_close(weights_of(measured), weights_of(plain), tolerance=0.0)
    found = report.metrics
    for mu, name in ((0.0, "policy_grad_norm"), (1.0, "expert_grad_norm")):
        alone = make_engine(model_path, ranks, sharding=sharding_of(zero_stage)).step(batches, mu=mu, lr=LR)
        assert found[name] == pytest.approx(alone.metrics["grad_norm"], rel=1e-4)
    expert, policy = MU * found["expert_grad_norm"], (1 - MU) * found["policy_grad_norm"]
    assert found["mu_effective"] == pytest.approx(expert / (expert + policy))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_checkpoint_restores_the_run_to_the_bit(
    model_path: Path, ranks: Ranks, tmp_path: Path, zero_stage: int
) -> None:
    engine, other = (make_engine(model_path, ranks, sharding=sharding_of(zero_stage)) for _ in range(2))
    check_restores_to_the_bit(engine, other, ranks, tmp_path)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_what_a_closed_engine_took_is_free_again(model_path: Path, ranks: Ranks, zero_stage: int) -> None:
    engine = make_engine(model_path, ranks, sharding=sharding_of(zero_stage))
    take_steps(engine, ranks, some_rows())
    internals: Any = engine
    left = [weakref.ref(internals._model), weakref.ref(internals._engine)]
    engine.close()
    del engine, internals
    gc.collect()
    assert [reference() for reference in left] == [None, None]


def test_a_checkpoint_of_another_zero_stage_is_named(model_path: Path, ranks: Ranks, tmp_path: Path) -> None:
    make_engine(model_path, ranks).save(tmp_path)
    with pytest.raises(OperatorError, match=r"got .*zero_stage': 3.* expected .*zero_stage': 0.* as it was written"):
        make_engine(model_path, ranks, sharding=sharding_of(3)).restore(tmp_path)


def test_parameters_are_made_whole_a_bucket_at_a_time(
    model_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, sharded = (make_engine(model_path, ranks, sharding=sharding_of(stage)) for stage in (0, 3))
    assert sharded.parameters_hash() == plain.parameters_hash()
    internals: Any = sharded
    named = list(internals._model.lm.named_parameters())
    monkeypatch.setattr("learner.shards.BUCKET_BYTES", 64 * 1024)
    num_whole = [sum(p.numel() == p.ds_numel for _, p in named) for _ in whole(named)]
    assert 1 <= max(num_whole) < len(named)
    assert not any(p.numel() for _, p in named)
    assert sharded.parameters_hash() == plain.parameters_hash()


def test_offload_is_refused_where_it_would_train_wrongly_or_move_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    check_offload(Sharding(2), CPU)
    with pytest.raises(OperatorError, match=r'got "optimizer" on a machine without a GPU, expected "none"'):
        check_offload(Sharding(2, offload="optimizer"), CPU)
    monkeypatch.setattr("learner.shards.version", lambda _: "0.18.9+cpu")
    with pytest.raises(OperatorError, match=r"with DeepSpeed 0.18.9\+cpu, expected DeepSpeed 0.19.0 or later"):
        check_offload(Sharding(2, offload="optimizer"), torch.device("cuda"))
