"""The gradient of one optimizer step is the paper's, however the step is cut, packed, padded, ordered or dealt out."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from common.weights.policy import pack_adapters, tensors_of_policy
from learner.adapters import Lora, trained_parameters
from learner.batch import TrainBatch, build_batch
from learner.objective import importance
from learner.objective.chord import expert_loss
from learner.objective.importance import Correction
from learner.policy_model import load_policy_model
from learner.ranks import Ranks
from learner.rows import Branch, Row
from learner.train_engine import Objective, TrainEngine
from tests import reference
from tests.judge import AdapterJudge, Judge, Verdict
from tests.rank_steps import CASES, KINDS, Case, Kind, report_name, rows_of_case
from tests.steps import (
    CPU,
    LORA,
    LR,
    VOCABULARY,
    Cut,
    Weights,
    make_engine,
    make_gauge,
    make_policy,
    measure,
    random_rows,
    sharding_of,
    weights_of,
)
from tests.tiny_model import make_tiny_model

TOLERANCE = 3e-5
"""Of the largest entry of the gradient: the judge counts in float64, the engine in float32."""

MEASURED = {"grad_norm", "policy_grad_norm", "expert_grad_norm", "mu_effective"}
"""Metrics that are no sums over tokens."""

CORRECTIONS: tuple[importance.Kind, ...] = get_args(importance.Kind)
PLAIN = KINDS[0]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def judge(model_path: Path) -> Judge:
    return Judge(model_path)


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return Ranks(CPU)


@pytest.fixture(scope="module")
def judges(model_path: Path, judge: Judge, tmp_path_factory: pytest.TempPathFactory) -> dict[Lora | None, Judge]:
    """With adapters it is a judge of the policy that they stand for."""
    folder = tmp_path_factory.mktemp("merged")
    adapters = {
        name: parameter.detach() for name, parameter in trained_parameters(make_policy(model_path, lora=LORA).lm)
    }
    save_file(pack_adapters(adapters, base=model_path, scale=LORA.scale), folder / "adapters")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.load_state_dict(dict(tensors_of_policy(folder / "adapters", model_path)), strict=False)
    model.save_pretrained(folder)
    return {None: judge, LORA: AdapterJudge(folder, adapters, LORA.scale)}


@pytest.fixture(scope="module")
def gauges(model_path: Path, ranks: Ranks) -> dict[Kind, TrainEngine]:
    return {kind: make_gauge(model_path, ranks, **kind.options) for kind in KINDS}


def quick(max_examples: int) -> Any:
    return settings(max_examples=max_examples, deadline=None, database=None, derandomize=True)


cuts = st.builds(
    Cut,
    budget=st.sampled_from([1, 25, 40, 64, 100, 4096]),
    shares_prompts=st.booleans(),
    order_seed=st.none() | st.integers(0, 99),
    padding_seed=st.none() | st.integers(0, 99),
    num_empty=st.integers(0, 2),
)


def corrections(kind: importance.Kind) -> st.SearchStrategy[Correction]:
    return st.builds(
        Correction,
        kind=st.just(kind),
        clip_low=st.sampled_from([0.1, 0.2]),
        clip_high=st.sampled_from([0.15, 0.28]),
        cap=st.sampled_from([1.3, 2.0]),
        band=st.sampled_from([(0.8, 1.25), (0.5, 5.0)]),
    )


@st.composite
def steps(draw: st.DrawFn, judge: Judge) -> list[Row]:
    num_groups = draw(st.integers(0, 2))
    return random_rows(
        judge,
        seed=draw(st.integers(0, 2**32)),
        num_groups=num_groups,
        num_experts=draw(st.integers(0 if num_groups else 1, 3)),
        spread=draw(st.sampled_from([0.0, 0.3, 2.0])),
        temperature=draw(st.sampled_from([0.7, 1.0, 1.6])),
        weights=draw(st.sampled_from(get_args(Weights))),
    )


def assert_judged(gradient: dict[str, Tensor], metrics: dict[str, float], verdict: Verdict) -> None:
    assert gradient.keys() == verdict.gradient.keys()
    scale = max(float(entry.abs().max()) for entry in verdict.gradient.values())
    for name, expected in verdict.gradient.items():
        worst = float((gradient[name].double() - expected).abs().max())
        assert worst <= TOLERANCE * scale + 1e-9, f"{name}: off by {worst} at scale {scale}"
    assert metrics["grad_norm"] == pytest.approx(norm_of(verdict), rel=1e-4, abs=1e-7)
    known = {name: value for name, value in verdict.metrics.items() if name in metrics}
    assert {"loss", "policy_entropy", "policy_ratio_sq_mean", "expert_nll_mean"} & known.keys()
    assert {name: metrics[name] for name in known} == pytest.approx(known, rel=1e-3, abs=1e-5)
    assert all(value == 0 for name, value in metrics.items() if name not in {*known, *MEASURED}), metrics


def mu_within(rows: list[Row], mu: float) -> float:
    """`mu` where both halves have rows; else the one that asks for nothing that is not there."""
    kinds = {row.branches[0].is_expert for row in rows}
    return mu if len(kinds) == 2 else float(kinds == {True})


def norm_of(verdict: Verdict) -> float:
    return math.sqrt(sum(float(entry.square().sum()) for entry in verdict.gradient.values()))


def assert_halves(metrics: dict[str, float], judge: Judge, rows: list[Row], mu: float, objective: Objective) -> None:
    correction, weighting = objective.correction, objective.expert_weighting
    policy, expert = (
        norm_of(judge.step(rows, correction=correction, weighting=weighting, mu=alone)) for alone in (0.0, 1.0)
    )
    assert metrics["policy_grad_norm"] == pytest.approx(policy, rel=1e-4, abs=1e-7)
    assert metrics["expert_grad_norm"] == pytest.approx(expert, rel=1e-4, abs=1e-7)
    assert metrics["mu_effective"] == pytest.approx(reference.effective_mu(mu, policy, expert), abs=1e-4)


@pytest.mark.parametrize("kind", CORRECTIONS)
@quick(12)
@given(data=st.data(), cut=cuts, mu=st.sampled_from([0.0, 0.3, 1.0]), weighting=st.sampled_from(["phi", "is", "none"]))
def test_the_gradient_of_a_step_is_the_judges_however_it_is_cut(
    kind: importance.Kind,
    judge: Judge,
    gauges: dict[Kind, TrainEngine],
    data: st.DataObject,
    cut: Cut,
    mu: float,
    weighting: Any,
) -> None:
    rows, correction = data.draw(steps(judge)), data.draw(corrections(kind))
    mu = mu_within(rows, mu)
    gradient, report = measure(gauges[PLAIN], cut.batches(rows), objective=Objective(correction, weighting), mu=mu)
    verdict = judge.step(rows, correction=correction, weighting=weighting, mu=mu)
    assert_judged(gradient, report.metrics, verdict)


@pytest.mark.parametrize("kind", KINDS[1:], ids=str)
@quick(4)
@given(data=st.data(), cut=cuts)
def test_the_gradient_of_a_step_is_the_judges_for_every_kind_of_engine(
    kind: Kind, judges: dict[Lora | None, Judge], gauges: dict[Kind, TrainEngine], data: st.DataObject, cut: Cut
) -> None:
    judge = judges[kind.lora]
    rows, correction = data.draw(steps(judge)), Correction()
    mu = mu_within(rows, 0.3)
    gradient, report = measure(gauges[kind], cut.batches(rows), objective=Objective(correction, "phi"), mu=mu)
    assert_judged(gradient, report.metrics, judge.step(rows, correction=correction, weighting="phi", mu=mu))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@quick(3)
@given(data=st.data(), cut=cuts, mu=st.sampled_from([0.0, 0.3, 1.0]))
def test_measuring_the_halves_gives_the_judges_norms_and_leaves_the_gradient_alone(
    kind: Kind, judges: dict[Lora | None, Judge], gauges: dict[Kind, TrainEngine], data: st.DataObject, cut: Cut,
    mu: float,
) -> None:  # fmt: skip
    judge = judges[kind.lora]
    rows, objective = data.draw(steps(judge)), Objective(Correction(), "phi")
    mu = mu_within(rows, mu)
    gradient, report = measure(gauges[kind], cut.batches(rows), objective=objective, mu=mu, measures_halves=True)
    assert_judged(gradient, report.metrics, judge.step(rows, correction=Correction(), weighting="phi", mu=mu))
    assert_halves(report.metrics, judge, rows, mu, Objective(Correction(), "phi"))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.zero_stage in (0, 3)], ids=str)
def test_recomputed_activations_leave_the_gradient_the_judges(
    kind: Kind, judges: dict[Lora | None, Judge], model_path: Path, ranks: Ranks
) -> None:
    gauge, judge = make_gauge(model_path, ranks, recompute_activations=True, **kind.options), judges[kind.lora]
    rows = [row for half in halves(judge) for row in half]
    verdict = judge.step(rows, correction=Correction(), weighting="phi", mu=0.3)
    for cut in (Cut(), Cut(budget=25, num_empty=1)):
        gradient, report = measure(gauge, cut.batches(rows), objective=Objective(Correction(), "phi"), mu=0.3)
        assert_judged(gradient, report.metrics, verdict)


@pytest.mark.parametrize("overlap_comm", [False, True])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_gets_the_gradient_of_every_micro_batch(
    stage: int, overlap_comm: bool, judge: Judge, model_path: Path, ranks: Ranks
) -> None:
    sharding = replace(sharding_of(stage), offload="optimizer", overlap_comm=overlap_comm)
    gauge, rows = make_gauge(model_path, ranks, sharding=sharding), [row for half in halves(judge) for row in half]
    batches = Cut(budget=25).batches(rows)
    assert len(batches) > 3
    for _ in range(2):
        gradient, report = measure(
            gauge, batches, objective=Objective(Correction(), "phi"), mu=0.3, measures_halves=True
        )
        assert_judged(gradient, report.metrics, judge.step(rows, correction=Correction(), weighting="phi", mu=0.3))
        assert_halves(report.metrics, judge, rows, 0.3, Objective(Correction(), "phi"))


@pytest.fixture(scope="module")
def two_ranks(model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks measured: one pair of processes for all stages and cases."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.rank_steps", str(model_path), str(folder)]
    said = [folder / f"rank-{rank}.log" for rank in range(2)]  # a pipe that nobody reads would stop one of them
    with ExitStack() as stack:
        processes = [
            subprocess.Popen(
                [*command, str(rank)],
                stdout=stack.enter_context(log.open("wb")),
                stderr=subprocess.STDOUT,
                env=environment,
            )
            for rank, log in enumerate(said)
        ]
        for process in processes:
            stack.callback(process.wait)
            stack.callback(process.kill)
        for process, log in zip(processes, said, strict=True):
            assert process.wait(timeout=1200) == 0, log.read_text()[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_ranks_have_the_gradient_of_the_judge_whoever_holds_what(
    kind: Kind, case: Case, judges: dict[Lora | None, Judge], two_ranks: Path
) -> None:
    name, rows, judge = report_name(kind, case), rows_of_case(judges[None], case), judges[kind.lora]
    gradient, metrics = (
        load_file(two_ranks / f"{name}.safetensors"),
        json.loads((two_ranks / f"{name}.json").read_text()),
    )
    correction, weighting = case.objective.correction, case.objective.expert_weighting
    assert_judged(gradient, metrics, judge.step(rows, correction=correction, weighting=weighting, mu=case.mu))
    assert_halves(metrics, judge, rows, case.mu, case.objective)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_ranks_publish_whole_weights_that_their_checkpoint_gives_back(
    kind: Kind, model_path: Path, two_ranks: Path
) -> None:
    name = str(KINDS.index(kind))
    expected = dict(trained_parameters(make_policy(model_path, lora=kind.lora).lm))
    published = load_file(two_ranks / f"{name}.weights")
    assert_same_bits(published, {name: parameter.detach() for name, parameter in expected.items()})
    before, after = json.loads((two_ranks / f"{name}.hashes").read_text())
    assert before == after


def halves(judge: Judge) -> tuple[list[Row], list[Row]]:
    """Policy rows and expert rows of one step."""
    rows = random_rows(judge, seed=5, num_groups=2, num_experts=3, spread=0.3, temperature=0.7)
    return rows[:2], rows[2:]


def weights_after(model_path: Path, ranks: Ranks, batches: Sequence[TrainBatch], *, mu: float) -> dict[str, Tensor]:
    """The parameters after three AdamW steps."""
    engine = make_engine(model_path, ranks)
    for _ in range(3):
        engine.step(batches, mu=mu, lr=LR)
    return weights_of(engine)


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_mu_of_zero_is_grpo_and_mu_of_one_is_sft_to_the_bit(
    mu: float, model_path: Path, judge: Judge, ranks: Ranks
) -> None:
    """Rows of the other half change no bit, before, between and after those that count, in micro-batches of their own.

    Packed into the same micro-batch they change its shape, and with it the order in which a matrix product adds up.
    """
    kept, dropped = halves(judge)[:: 1 if mu == 0 else -1]
    batches, others = Cut(budget=25).batches(kept), Cut(budget=25).batches(dropped)
    assert len(batches) > 1
    alone = weights_after(model_path, ranks, batches, mu=mu)
    assert_same_bits(weights_after(model_path, ranks, [*others[:1], *batches, *others[1:]], mu=mu), alone)
    assert_same_bits(weights_after(model_path, ranks, [batches[0], *others, *batches[1:]], mu=mu), alone)


@pytest.mark.parametrize("mu", [0.0, 1.0])
def test_what_the_other_half_says_changes_no_bit_even_in_the_same_micro_batch(
    mu: float, model_path: Path, judge: Judge, ranks: Ranks
) -> None:
    kept, dropped = halves(judge)[:: 1 if mu == 0 else -1]
    otherwise = [replace(row, branches=tuple(with_other_tokens(branch) for branch in row.branches)) for row in dropped]
    weights, changed = (
        weights_after(model_path, ranks, [build_batch([*kept, *others])], mu=mu) for others in (dropped, otherwise)
    )
    assert_same_bits(changed, weights)


def with_other_tokens(branch: Branch) -> Branch:
    return replace(branch, tokens=(branch.tokens + 1) % VOCABULARY, advantage=branch.advantage * -2)


@pytest.mark.parametrize("p", [0.05, 0.2356, 0.5, 0.95])
def test_the_pull_of_phi_on_a_logit_is_the_finite_difference_with_phi_frozen(p: float) -> None:
    logit, h = math.log(p / (1 - p)), 1e-6

    def log_p(z: float) -> float:
        return -math.log1p(math.exp(-z))

    logits = torch.tensor([[logit, 0.0]], dtype=torch.float64).requires_grad_()
    chosen = logits.log_softmax(-1)[:, :1]
    loss, _ = expert_loss(chosen, torch.ones_like(chosen), weighting="phi", num_tokens=1)
    (grad,) = torch.autograd.grad(loss, logits)
    difference = -p * (1 - p) * (log_p(logit + h) - log_p(logit - h)) / (2 * h)
    assert grad[0, 0].item() == pytest.approx(difference, rel=1e-6)
    assert grad[0, 0].item() == pytest.approx(-p * (1 - p) ** 2, rel=1e-9)


def test_a_micro_batch_of_nothing_but_nan_where_there_is_no_loss_leaves_a_finite_gradient(
    judge: Judge, gauges: dict[Kind, TrainEngine]
) -> None:
    policy, experts = halves(judge)
    for rows, mu in ((policy, 0.0), (experts, 1.0)):
        silent = [
            replace(row, branches=tuple(
                replace(b, mask=np.zeros_like(b.mask), behavior_logprobs=np.full_like(b.mask, np.nan),
                        advantage=math.nan) for b in row.branches
            )) for row in rows
        ]  # fmt: skip
        gradient, report = measure(
            gauges[PLAIN], [build_batch(silent), build_batch(rows)], objective=Objective(Correction(), "phi"), mu=mu
        )
        assert_judged(gradient, report.metrics, judge.step(rows, correction=Correction(), weighting="phi", mu=mu))


def test_log_probs_are_taken_in_float32_whatever_precision_the_parameters_have(model_path: Path) -> None:
    """bfloat16 would make of every p below e^-5.5 one of a few values, and of small ones 0."""
    model = load_policy_model(model_path, dtype=torch.bfloat16, head_chunk_tokens=16)
    tokens = np.arange(40, dtype=np.int32)
    branch = Branch(tokens, np.ones(40, np.float32), np.full(40, np.nan, np.float32), math.nan, 1.0, is_expert=True)
    logprobs, _ = model(build_batch([Row(tokens[:5], (branch,))]))
    assert logprobs.dtype == torch.float32
    assert (logprobs != logprobs.bfloat16().float()).sum() > 30
