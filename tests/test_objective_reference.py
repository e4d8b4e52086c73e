"""The objective agrees with the slow reference and with numbers computed by hand, and keeps its invariants."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, tensor

from learner.objective.advantages import group_advantages
from learner.objective.chord import adaptive_mu, chord_loss, effective_mu, expert_loss, mu_at
from learner.objective.importance import Correction, Kind, effective_sample_frac
from learner.objective.policy import policy_loss
from learner.objective.rewards import soft_overlong_penalty
from learner.rows import Aggregation, loss_weights
from tests import reference
from tests.reference import Array, Outcome

Indices = NDArray[np.intp]
Weighting = Literal["phi", "is", "none"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WEIGHTINGS: tuple[Weighting, ...] = get_args(Weighting)
LN2 = math.log(2)

quick = settings(max_examples=50, deadline=None, derandomize=True)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_weighting = pytest.mark.parametrize("weighting", WEIGHTINGS)


@dataclass(frozen=True)
class Rows:
    """A micro-batch of either half, [B, T], advantages [B]; the expert half reads only the log-probs and the mask."""

    logprobs: Array
    behavior: Array
    proximal: Array | None
    advantages: Array
    mask: Array
    num_tokens: float


@st.composite
def rows(draw: st.DrawFn) -> Rows:
    """Off-policy by a spread from none to large; masks of ones or of weights; rows without any token among them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    B, T = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    spread = draw(st.sampled_from([0.0, 0.1, 1.0]))
    weights = np.ones((B, T)) if draw(st.booleans()) else rng.uniform(0.1, 3.0, (B, T))
    keep = (rng.random((B, T)) < 0.7) & (rng.random((B, 1)) < 0.9)
    behavior = -rng.exponential(1.5, (B, T))
    return Rows(
        logprobs=behavior + spread * rng.normal(size=(B, T)),
        behavior=behavior,
        proximal=behavior + spread * rng.normal(size=(B, T)) if draw(st.booleans()) else None,
        advantages=rng.normal(size=B),
        mask=np.where(keep, weights, 0.0),
        num_tokens=draw(st.sampled_from([0.0, 1.0, 37.5])),
    )


@st.composite
def splits(draw: st.DrawFn, x: Rows) -> list[Indices]:
    """The indices of the rows in each of three micro-batches, of which some may be empty."""
    B = len(x.mask)
    part = np.array(draw(st.lists(st.integers(0, 2), min_size=B, max_size=B)))
    return [np.flatnonzero(part == i) for i in range(3)]


def corrections(kind: Kind) -> st.SearchStrategy[Correction]:
    return st.builds(
        Correction,
        kind=st.just(kind),
        clip_low=st.sampled_from([0.0, 0.1, 0.2, 1.0]),
        clip_high=st.sampled_from([0.0, 0.28, 0.5]),
        cap=st.sampled_from([1.0, 1.3, 2.0, math.inf]),
        band=st.sampled_from([(0.0, 1.0), (0.8, 1.25), (0.5, 5.0)]),
    )


def torch_policy(x: Rows, logprobs: Tensor, correction: Correction) -> tuple[Tensor, dict[str, Tensor]]:
    return policy_loss(
        logprobs,
        tensor(x.behavior),
        tensor(x.advantages),
        tensor(x.mask),
        correction=correction,
        num_tokens=x.num_tokens,
        proximal_logprobs=None if x.proximal is None else tensor(x.proximal),
    )


def torch_expert(x: Rows, logprobs: Tensor, weighting: Weighting) -> tuple[Tensor, dict[str, Tensor]]:
    return expert_loss(logprobs, tensor(x.mask), weighting=weighting, num_tokens=x.num_tokens)


def policy(x: Rows, correction: Correction) -> Outcome:
    logprobs = tensor(x.logprobs).requires_grad_()
    return outcome(*torch_policy(x, logprobs, correction), logprobs)


def expert(x: Rows, weighting: Weighting) -> Outcome:
    logprobs = tensor(x.logprobs).requires_grad_()
    return outcome(*torch_expert(x, logprobs, weighting), logprobs)


def outcome(loss: Tensor, metrics: dict[str, Tensor], logprobs: Tensor) -> Outcome:
    assert loss.ndim == 0
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())
    (grad,) = torch.autograd.grad(loss, logprobs)
    return Outcome(loss.item(), grad.numpy(), {name: value.item() for name, value in metrics.items()})


def reference_policy(x: Rows, correction: Correction) -> Outcome:
    return reference.policy(
        x.logprobs, x.behavior, x.advantages, x.mask, x.num_tokens, x.proximal, **asdict(correction)
    )


def take(x: Rows, index: Indices) -> Rows:
    return Rows(
        logprobs=x.logprobs[index],
        behavior=x.behavior[index],
        proximal=None if x.proximal is None else x.proximal[index],
        advantages=x.advantages[index],
        mask=x.mask[index],
        num_tokens=x.num_tokens,
    )


def with_nan(x: Rows) -> Rows:
    """NaN wherever the mask is 0, and as the advantage of rows without any token."""
    is_masked = x.mask == 0
    return Rows(
        logprobs=np.where(is_masked, math.nan, x.logprobs),
        behavior=np.where(is_masked, math.nan, x.behavior),
        proximal=None if x.proximal is None else np.where(is_masked, math.nan, x.proximal),
        advantages=np.where(is_masked.all(-1), math.nan, x.advantages),
        mask=x.mask,
        num_tokens=x.num_tokens,
    )


def no_tokens(B: int) -> Rows:
    """B rows that hold nothing but NaN."""
    nan = np.full((B, 3), math.nan)
    return Rows(nan, nan, nan, advantages=np.full(B, math.nan), mask=np.zeros((B, 3)), num_tokens=0.0)


def added_up(outcomes: list[Outcome], parts: list[Indices]) -> Outcome:
    """The micro-batches' losses and metrics summed, their gradients put back in the order of the rows."""
    grad = np.concatenate([part.grad for part in outcomes])[np.argsort(np.concatenate(parts))]
    names = outcomes[0].metrics
    metrics = {name: sum(part.metrics[name] for part in outcomes) for name in names}
    return Outcome(sum(part.loss for part in outcomes), grad, metrics)


def phi_gradient(p: float) -> float:
    """d/d log p of the φ-weighted loss of one expert token."""
    log_p = tensor([[math.log(p)]], dtype=torch.float64).requires_grad_()
    loss, _ = expert_loss(log_p, torch.ones_like(log_p), weighting="phi", num_tokens=1)
    (grad,) = torch.autograd.grad(loss, log_p)
    return grad.item()


def assert_close(actual: Outcome, expected: Outcome) -> None:
    assert actual.loss == pytest.approx(expected.loss, rel=1e-9, abs=1e-10)
    np.testing.assert_allclose(actual.grad, expected.grad, rtol=1e-9, atol=1e-10)
    assert actual.metrics == pytest.approx(expected.metrics, rel=1e-9, abs=1e-10)


def assert_identical(actual: Outcome, expected: Outcome) -> None:
    assert (actual.loss, actual.metrics) == (expected.loss, expected.metrics)
    np.testing.assert_array_equal(actual.grad, expected.grad)


def row(*values: float) -> Tensor:
    """[1, T] in float32."""
    return tensor([values])


def off_policy(kind: Kind, ratios: list[float], A: float, **bounds: Any) -> Outcome:
    """One row in float32: π_θ = 1/2 for every token, sampled by the π_b that gives these π_θ/π_b."""
    behavior = row(*(-LN2 - math.log(ratio) for ratio in ratios))
    logprobs = torch.full_like(behavior, -LN2).requires_grad_()
    loss, metrics = policy_loss(
        logprobs,
        behavior,
        tensor([A]),
        torch.ones_like(behavior),
        correction=Correction(kind=kind, **bounds),
        num_tokens=len(ratios),
    )
    return outcome(loss, metrics, logprobs)


@every_kind
@quick
@given(data=st.data(), x=rows())
def test_policy_loss_agrees_with_the_reference(kind: Kind, data: st.DataObject, x: Rows):
    correction = data.draw(corrections(kind))
    assert_close(policy(x, correction), reference_policy(x, correction))


@every_weighting
@quick
@given(x=rows())
def test_expert_loss_agrees_with_the_reference(weighting: Weighting, x: Rows):
    assert_close(expert(x, weighting), reference.expert(x.logprobs, x.mask, weighting, x.num_tokens))


@quick
@given(data=st.data(), x=rows(), y=rows(), mu=st.floats(0, 1))
def test_a_whole_step_in_micro_batches_has_the_loss_and_gradient_of_the_reference(
    data: st.DataObject, x: Rows, y: Rows, mu: float
):
    correction = data.draw(corrections(data.draw(st.sampled_from(KINDS))))
    weighting = data.draw(st.sampled_from(WEIGHTINGS))
    x_parts, y_parts = data.draw(splits(x)), data.draw(splits(y))

    x_logprobs, y_logprobs = tensor(x.logprobs).requires_grad_(), tensor(y.logprobs).requires_grad_()
    total = 0.0
    for i, j in zip(x_parts, y_parts, strict=True):
        L_GRPO, _ = torch_policy(take(x, i), x_logprobs[i], correction)
        L_SFT, _ = torch_expert(take(y, j), y_logprobs[j], weighting)
        loss = chord_loss(L_GRPO, L_SFT, mu=mu)
        loss.backward()
        total += loss.item()

    expected, x_grad, y_grad = reference.chord(
        reference_policy(x, correction), reference.expert(y.logprobs, y.mask, weighting, y.num_tokens), mu
    )
    assert x_logprobs.grad is not None
    assert y_logprobs.grad is not None
    assert total == pytest.approx(expected, rel=1e-9, abs=1e-10)
    np.testing.assert_allclose(x_logprobs.grad.numpy(), x_grad, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(y_logprobs.grad.numpy(), y_grad, rtol=1e-9, atol=1e-10)


@every_kind
@quick
@given(data=st.data(), x=rows())
def test_policy_loss_and_metrics_add_up_over_any_split(kind: Kind, data: st.DataObject, x: Rows):
    correction, parts = data.draw(corrections(kind)), data.draw(splits(x))
    assert_close(added_up([policy(take(x, i), correction) for i in parts], parts), policy(x, correction))


@every_weighting
@quick
@given(data=st.data(), x=rows())
def test_expert_loss_and_metrics_add_up_over_any_split(weighting: Weighting, data: st.DataObject, x: Rows):
    parts = data.draw(splits(x))
    assert_close(added_up([expert(take(x, i), weighting) for i in parts], parts), expert(x, weighting))


@every_kind
@quick
@given(data=st.data(), x=rows())
def test_nan_in_masked_policy_entries_changes_nothing(kind: Kind, data: st.DataObject, x: Rows):
    correction = data.draw(corrections(kind))
    actual = policy(with_nan(x), correction)
    assert_identical(actual, policy(x, correction))
    assert not actual.grad[x.mask == 0].any()


@every_weighting
@quick
@given(x=rows())
def test_nan_in_masked_expert_entries_changes_nothing(weighting: Weighting, x: Rows):
    actual = expert(with_nan(x), weighting)
    assert_identical(actual, expert(x, weighting))
    assert not actual.grad[x.mask == 0].any()


@every_kind
@quick
@given(data=st.data(), x=rows())
def test_the_order_of_rows_does_not_matter(kind: Kind, data: st.DataObject, x: Rows):
    correction = data.draw(corrections(kind))
    order = np.array(data.draw(st.permutations(range(len(x.mask)))))
    whole = policy(x, correction)
    assert_close(policy(take(x, order), correction), replace(whole, grad=whole.grad[order]))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gspo"])
@quick
@given(data=st.data(), x=rows())
def test_how_tokens_are_packed_into_rows_does_not_matter(kind: Kind, data: st.DataObject, x: Rows):
    correction = data.draw(corrections(kind))
    one_per_row = Rows(
        logprobs=x.logprobs.reshape(-1, 1),
        behavior=x.behavior.reshape(-1, 1),
        proximal=None if x.proximal is None else x.proximal.reshape(-1, 1),
        advantages=x.advantages.repeat(x.mask.shape[1]),
        mask=x.mask.reshape(-1, 1),
        num_tokens=x.num_tokens,
    )
    whole = policy(x, correction)
    assert_close(policy(one_per_row, correction), replace(whole, grad=whole.grad.reshape(-1, 1)))


@every_kind
@quick
@given(data=st.data(), x=rows())
def test_on_policy_every_correction_has_the_gradient_of_plain_policy_gradient(kind: Kind, data: st.DataObject, x: Rows):
    on_policy = replace(x, behavior=x.logprobs, proximal=None)
    actual = policy(on_policy, data.draw(corrections(kind)))
    expected = -x.mask * x.advantages[:, None] / max(x.num_tokens, 1.0)
    np.testing.assert_allclose(actual.grad, expected, rtol=1e-9, atol=1e-12)


@every_kind
@pytest.mark.parametrize("B", [0, 2])
def test_a_policy_batch_without_tokens_gives_zero_with_a_gradient(kind: Kind, B: int):
    actual = policy(no_tokens(B), Correction(kind=kind))
    assert_identical(actual, Outcome(0.0, np.zeros((B, 3)), dict.fromkeys(actual.metrics, 0.0)))


@every_weighting
@pytest.mark.parametrize("B", [0, 2])
def test_an_expert_batch_without_tokens_gives_zero_with_a_gradient(weighting: Weighting, B: int):
    actual = expert(no_tokens(B), weighting)
    assert_identical(actual, Outcome(0.0, np.zeros((B, 3)), dict.fromkeys(actual.metrics, 0.0)))


@pytest.mark.parametrize(
    ("kind", "loss", "grad"),
    [
        # ratios 1/4, 1, 3/2, 8 with A = 1, log π_θ = −ln 2, N = 4
        ("none", LN2, [-1 / 4, -1 / 4, -1 / 4, -1 / 4]),
        ("ppo", -(0.25 + 1 + 1.2 + 1.2) / 4, [-0.25 / 4, -1 / 4, 0, 0]),
        ("tis", -(0.25 + 1 + 1.5 + 2) / 4, [-0.25 / 4, -1 / 4, -1.5 / 4, -2 / 4]),
        ("icepop", -(0 + 1 + 1.5 + 0) / 4, [0, -1 / 4, -1.5 / 4, 0]),
        ("decoupled", -(0.25 + 1 + 1.5 + 8) / 4, [-0.25 / 4, -1 / 4, -1.5 / 4, -8 / 4]),
        ("cispo", LN2 * (0.25 + 1 + 1.2 + 1.2) / 4, [-0.25 / 4, -1 / 4, -1.2 / 4, -1.2 / 4]),
        # the geometric mean of the ratios is 3^(1/4) = 1.316, beyond 1.2
        ("gspo", -1.2, [0, 0, 0, 0]),
    ],
)
def test_positive_advantages_give_the_numbers_computed_by_hand(kind: Kind, loss: float, grad: list[float]):
    actual = off_policy(kind, [0.25, 1.0, 1.5, 8.0], A=1.0)
    assert actual.loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(actual.grad, [grad], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "loss", "grad"),
    [
        ("ppo", (0.8 + 1 + 1.5 + 8) / 4, [0, 1 / 4, 1.5 / 4, 8 / 4]),
        ("tis", (0.25 + 1 + 1.5 + 2) / 4, [0.25 / 4, 1 / 4, 1.5 / 4, 2 / 4]),
        ("gspo", 3**0.25, [3**0.25 / 4] * 4),
    ],
)
def test_negative_advantages_give_the_numbers_computed_by_hand(kind: Kind, loss: float, grad: list[float]):
    actual = off_policy(kind, [0.25, 1.0, 1.5, 8.0], A=-1.0)
    assert actual.loss == pytest.approx(loss, rel=1e-6)
    np.testing.assert_allclose(actual.grad, [grad], rtol=1e-6)


def test_policy_metrics_give_the_numbers_computed_by_hand():
    ratios = [0.25, 1.0, 1.5, 8.0]
    common = {
        "ratio_mean": 10.75 / 4,
        "ratio_sq_mean": (0.0625 + 1 + 2.25 + 64) / 4,
        "mismatch_kl": (10.75 - 4 - math.log(3)) / 4,
    }
    shares = {
        "none": (0, 0, 0),
        "ppo": (2 / 4, 0, 0),
        "tis": (0, 1 / 4, 0),
        "icepop": (0, 0, 2 / 4),
        "decoupled": (0, 0, 0),
        "cispo": (0, 2 / 4, 0),
        "gspo": (1, 0, 0),
    }
    for kind in KINDS:
        expected = common | dict(zip(("clip_frac", "cap_frac", "masked_frac"), shares[kind], strict=True))
        assert off_policy(kind, ratios, A=1.0).metrics == pytest.approx(expected, rel=1e-5), kind


def test_with_a_proximal_policy_the_clip_sees_only_the_update():
    # k = π_prox/π_b = 4 is cut to 2; u = π_θ/π_prox = 2 is clipped to 1.2.
    logprobs = row(-LN2).requires_grad_()
    loss, metrics = policy_loss(
        logprobs,
        row(-4 * LN2),
        tensor([1.0]),
        row(1.0),
        correction=Correction(kind="tis"),
        num_tokens=1,
        proximal_logprobs=row(-2 * LN2),
    )
    actual = outcome(loss, metrics, logprobs)
    assert actual.loss == pytest.approx(-2.4)
    assert actual.grad == 0
    assert (actual.metrics["clip_frac"], actual.metrics["cap_frac"]) == (1, 1)


def test_rejected_tokens_stay_in_the_denominator():
    assert off_policy("icepop", [1.0, 100.0, 100.0, 100.0], A=1.0).loss == pytest.approx(-1 / 4)


@every_kind
@pytest.mark.parametrize("A", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [-1000.0, 1000.0])
def test_an_absurd_log_ratio_stays_finite(kind: Kind, A: float, log_ratio: float):
    logprobs = row(-1.0).requires_grad_()
    loss, metrics = policy_loss(
        logprobs, row(-1.0 - log_ratio), tensor([A]), row(1.0), correction=Correction(kind=kind), num_tokens=1
    )
    actual = outcome(loss, metrics, logprobs)
    assert np.isfinite([actual.loss, *actual.grad.flat, *actual.metrics.values()]).all()
    assert actual.metrics["ratio_mean"] == pytest.approx(math.exp(math.copysign(20, log_ratio)), rel=1e-5)


def test_expert_loss_gives_the_numbers_computed_by_hand():
    logprobs = row(math.log(0.5), math.log(0.95), math.log(0.05), math.nan)
    mask = row(1.0, 1.0, 2.0, 0.0)
    nll = (-math.log(0.5) - math.log(0.95) - 2 * math.log(0.05)) / 8
    shares = {"p_lt_01_frac": 2 / 8, "p_gt_09_frac": 1 / 8, "nll_mean": nll}

    loss, metrics = expert_loss(logprobs, mask, weighting="phi", num_tokens=8)
    assert loss.item() == pytest.approx(-(0.25 * math.log(0.5) + 0.0475 * math.log(0.95) + 0.095 * math.log(0.05)) / 8)
    assert metrics == pytest.approx({"phi_mean": (0.25 + 0.0475 + 0.095) / 8, **shares})

    loss, metrics = expert_loss(logprobs, mask, weighting="is", num_tokens=8)
    assert loss.item() == pytest.approx(-(0.5 * math.log(0.5) + 0.95 * math.log(0.95) + 0.1 * math.log(0.05)) / 8)
    assert metrics == pytest.approx({"phi_mean": (0.5 + 0.95 + 0.1) / 8, **shares})

    loss, metrics = expert_loss(logprobs, mask, weighting="none", num_tokens=8)
    assert loss.item() == pytest.approx(nll)
    assert metrics == pytest.approx({"phi_mean": 4 / 8, **shares})


@pytest.mark.parametrize("p", [0.05, 0.2356, 0.5, 0.95])
def test_the_gradient_of_phi_is_the_finite_difference_of_the_loss_with_phi_frozen(p: float):
    log_p, h = math.log(p), 1e-6
    phi = p * (1 - p)
    difference = (-phi * (log_p + h) + phi * (log_p - h)) / (2 * h)
    assert phi_gradient(p) == pytest.approx(difference, rel=1e-6)
    assert phi_gradient(p) == pytest.approx(-p * (1 - p), rel=1e-12)


@pytest.mark.parametrize(("p", "sign_without_stop_gradient"), [(0.05, 1), (0.2356, 0), (0.5, -1), (0.95, -1)])
def test_unlikely_expert_tokens_are_learned_not_unlearned(p: float, sign_without_stop_gradient: int):
    log_p = tensor(math.log(p)).requires_grad_()
    (wrong,) = torch.autograd.grad(-log_p.exp() * (1 - log_p.exp()) * log_p, log_p)
    assert np.sign(round(wrong.item(), 4)) == sign_without_stop_gradient
    assert phi_gradient(p) < 0


def test_the_pull_of_phi_on_a_logit_is_largest_at_one_third():
    ps = np.linspace(0.01, 0.99, 295)
    logits = tensor(np.stack([np.log(ps / (1 - ps)), np.zeros_like(ps)], axis=-1)).requires_grad_()
    loss, _ = expert_loss(logits.log_softmax(-1)[:, :1], torch.ones(295, 1), weighting="phi", num_tokens=1)
    (grad,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(grad[:, 0], -ps * (1 - ps) ** 2, rtol=1e-9)
    assert ps[grad[:, 0].argmin()] == pytest.approx(1 / 3, abs=1 / 300)


def test_an_expert_token_far_below_float16_is_still_learned():
    logprobs = row(-80.0).requires_grad_()
    loss, _ = expert_loss(logprobs, row(1.0), weighting="phi", num_tokens=1)
    (grad,) = torch.autograd.grad(loss, logprobs)
    assert grad.item() == pytest.approx(-math.exp(-80), rel=1e-5)


@given(policy=st.floats(-1e6, 1e6, width=32), expert=st.floats(-1e6, 1e6, width=32))
@quick
def test_mu_of_zero_and_of_one_keep_one_half_to_the_bit(policy: float, expert: float):
    for mu, kept, grads in ((0.0, policy, (1.0, 0.0)), (1.0, expert, (0.0, 1.0))):
        halves = tensor(policy).requires_grad_(), tensor(expert).requires_grad_()
        loss = chord_loss(*halves, mu=mu)
        assert loss.item() == kept
        assert tuple(grad.item() for grad in torch.autograd.grad(loss, halves)) == grads


def test_chord_weighs_the_halves_by_mu():
    assert chord_loss(tensor(2.0), tensor(-4.0), mu=0.25).item() == 0.5


@given(
    step=st.integers(0, 700),
    peak=st.floats(0, 1),
    valley=st.floats(0, 1),
    warmup=st.integers(0, 300),
    decay=st.integers(1, 300),
)
@quick
def test_mu_agrees_with_the_reference_and_stays_within_zero_and_one(
    step: int, peak: float, valley: float, warmup: int, decay: int
):
    mu = mu_at(step, peak=peak, valley=valley, warmup_steps=warmup, decay_steps=decay)
    assert mu == pytest.approx(reference.mu(step, peak, valley, warmup, decay), abs=1e-15)
    assert 0 <= mu <= 1


def test_mu_starts_at_zero_with_warm_up_and_at_the_peak_without():
    assert mu_at(0, peak=0.9, valley=0.05, warmup_steps=10, decay_steps=200) == 0
    assert mu_at(10, peak=0.9, valley=0.05, warmup_steps=10, decay_steps=200) == pytest.approx(0.9, rel=1e-15)
    assert mu_at(0, peak=0.9, valley=0.05, warmup_steps=0, decay_steps=200) == pytest.approx(0.9, rel=1e-15)
    assert mu_at(100, peak=0.9, valley=0.1, warmup_steps=0, decay_steps=200) == pytest.approx(0.5)
    assert mu_at(200, peak=0.9, valley=0.05, warmup_steps=0, decay_steps=200) == 0.05
    assert mu_at(7, peak=0.1, valley=0.1, warmup_steps=0, decay_steps=0) == 0.1


@pytest.mark.parametrize(
    "wrong",
    [
        {"step": -1},
        {"warmup_steps": -1},
        {"decay_steps": -1},
        {"decay_steps": 0},
        {"peak": 1.1},
        {"peak": math.nan},
        {"valley": -0.1},
    ],
)
def test_an_impossible_mu_schedule_is_refused_with_what_was_got_and_expected(wrong: dict[str, Any]):
    schedule: dict[str, Any] = {"step": 0, "peak": 0.9, "valley": 0.05, "warmup_steps": 0, "decay_steps": 200, **wrong}
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: got .*, expected"):
        mu_at(schedule.pop("step"), **schedule)


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "vtrace"},
        {"clip_low": -0.1},
        {"clip_low": 1.1},
        {"clip_high": -0.1},
        {"clip_high": math.nan},
        {"cap": 0.0},
        {"band": (5.0, 0.5)},
        {"band": (1.0, 1.0)},
        {"band": (-1.0, 1.0)},
        {"band": (1.0,)},
    ],
)
def test_an_impossible_correction_is_refused_with_what_was_got_and_expected(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))}: got .*, expected"):
        Correction(**wrong)


def test_an_unknown_weighting_is_refused():
    with pytest.raises(ValueError, match=r"^weighting: got 'sqrt', expected"):
        expert_loss(row(-1.0), row(1.0), weighting="sqrt", num_tokens=1)  # pyright: ignore[reportArgumentType]


@quick
@given(rewards=st.lists(st.integers(-8, 8), min_size=2, max_size=16), scale=st.sampled_from(["std", "none"]))
def test_group_advantages_agree_with_the_reference(rewards: list[int], scale: Literal["std", "none"]):
    R = np.array(rewards) / 8
    A = group_advantages(tensor(R), scale=scale)
    np.testing.assert_allclose(A.numpy(), reference.advantages(R, scale, 1e-6), rtol=1e-9, atol=1e-12)


def test_group_advantages_give_the_numbers_computed_by_hand():
    # mean 1/2; unbiased std √(4 · ¼ / 3) = 1/√3
    A = group_advantages(tensor([1.0, 0.0, 0.0, 1.0]))
    torch.testing.assert_close(A, tensor([1.0, -1.0, -1.0, 1.0]) * math.sqrt(3) / 2)
    assert group_advantages(tensor([1.0, 0.0, 0.0, 1.0]), scale="none").tolist() == [0.5, -0.5, -0.5, 0.5]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("K", [2, 3, 7, 11])
def test_equal_rewards_carry_no_signal_whatever_rounding_makes_of_their_mean(scale: Literal["std", "none"], K: int):
    for dtype in (torch.float32, torch.float64):
        assert group_advantages(torch.full((K,), 0.1, dtype=dtype), scale=scale).tolist() == [0.0] * K


def test_a_difference_below_eps_is_still_a_signal():
    assert group_advantages(tensor([0.0, 1e-8]))[1] > 0


@pytest.mark.parametrize("rewards", [[], [1.0], [[0.0, 1.0], [1.0, 0.0]], [0.0, math.nan], [0.0, math.inf]])
def test_rewards_that_are_no_group_are_refused(rewards: Any):
    with pytest.raises(ValueError, match=r"^rewards: got .*, expected"):
        group_advantages(tensor(rewards))


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize(
    "rewards", [[1.0, 1.0001], [0.5, 0.501], [1.0, 1.001, 1.002], [100.0, 100.0, 100.01], [-1e6, 1e6]]
)
def test_rewards_that_lie_close_together_lose_no_digits(rewards: list[float], scale: Literal["std", "none"]):
    R = tensor(rewards)
    assert R.dtype == torch.float32
    expected = reference.advantages(R.double().numpy(), scale, 1e-6)
    np.testing.assert_allclose(group_advantages(R, scale=scale).numpy(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rewards", [[1, 0, 0, 1], [True, False, False, True]])
def test_whole_numbers_are_rewards_too(rewards: list[int]):
    found = group_advantages(tensor(rewards))
    assert torch.equal(found, group_advantages(tensor(rewards).float()))
    assert group_advantages(tensor(rewards) * 0).tolist() == [0.0] * 4
    assert found.dtype == group_advantages(tensor(rewards) * 0).dtype == torch.float32


def test_the_effective_sample_size_gives_the_numbers_computed_by_hand():
    assert effective_sample_frac(1.0, 1.0) == 1.0
    assert effective_sample_frac(4 / 3, 6 / 3) == pytest.approx(8 / 9)  # ratios of 1, 1 and 2: 16/3 of 6
    assert effective_sample_frac(0.0, 0.0) is None


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"^scale: got 'range', expected"):
        group_advantages(tensor([0.0, 1.0]), scale="range")  # pyright: ignore[reportArgumentType]


@quick
@given(mean_reward=st.floats(-2, 2), target=st.floats(0, 2))
def test_an_adaptive_mu_agrees_with_the_reference(mean_reward: float, target: float):
    mu = adaptive_mu(mean_reward, target=target)
    assert mu == reference.adaptive_mu(mean_reward, target)
    assert 0 <= mu <= 1


def test_an_adaptive_mu_gives_the_numbers_computed_by_hand():
    mus = [adaptive_mu(mean_reward, target=0.5) for mean_reward in (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0)]
    assert mus == [1.0, 1.0, 0.5, 0.25, 0.0, 0.0]


@quick
@given(mu=st.floats(0, 1), policy_norm=st.floats(0, 1e3), expert_norm=st.floats(0, 1e3))
def test_effective_mu_agrees_with_the_reference(mu: float, policy_norm: float, expert_norm: float):
    effective = effective_mu(mu, policy_norm=policy_norm, expert_norm=expert_norm)
    assert effective == pytest.approx(reference.effective_mu(mu, policy_norm, expert_norm), abs=1e-12)
    assert 0 <= effective <= 1


def test_effective_mu_gives_the_numbers_computed_by_hand():
    assert effective_mu(0.25, policy_norm=1.0, expert_norm=3.0) == 0.5
    assert effective_mu(0.3, policy_norm=0.0, expert_norm=2.0) == 1.0
    assert effective_mu(0.3, policy_norm=2.0, expert_norm=0.0) == 0.0
    assert effective_mu(0.3, policy_norm=0.0, expert_norm=0.0) == 0.0


@quick
@given(data=st.data(), max_tokens=st.integers(1, 2000))
def test_the_soft_overlong_penalty_agrees_with_the_reference(data: st.DataObject, max_tokens: int):
    buffer_tokens = data.draw(st.integers(1, max_tokens))
    lengths = data.draw(st.lists(st.integers(1, max_tokens + 50), min_size=2, max_size=8))
    penalty = soft_overlong_penalty(tensor(lengths), max_tokens=max_tokens, buffer_tokens=buffer_tokens)
    expected = [reference.soft_overlong_penalty(length, max_tokens, buffer_tokens) for length in lengths]
    np.testing.assert_allclose(penalty.numpy(), expected, rtol=1e-6, atol=1e-7)


def test_the_soft_overlong_penalty_gives_the_numbers_computed_by_hand():
    penalty = soft_overlong_penalty(tensor([1, 80, 81, 90, 99, 100, 101]), max_tokens=100, buffer_tokens=20)
    torch.testing.assert_close(penalty, tensor([0, 0, -0.05, -0.5, -0.95, -1, -1]))


@quick
@given(mask=st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
def test_loss_weights_agree_with_the_reference_and_a_sequence_mean_weighs_sequences_alike(mask: list[bool]):
    ones = np.array(mask, dtype=np.float32)
    aggregations: tuple[Aggregation, ...] = get_args(Aggregation)
    for aggregation in aggregations:
        weights = loss_weights(ones, aggregation)
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights, reference.loss_weights(ones.astype(np.float64), aggregation), rtol=1e-6)
    assert loss_weights(ones, "sequence_mean").sum() == pytest.approx(1.0, rel=1e-5)


@every_weighting
@quick
@given(x=rows())
def test_a_sequence_mean_is_the_mean_over_sequences_of_their_own_means(weighting: Weighting, x: Rows):
    kept = [i for i in range(len(x.mask)) if (x.mask[i] > 0).any()]
    if not kept:
        return
    masks = [(x.mask[i] > 0).astype(np.float32) for i in kept]
    weights = np.stack([loss_weights(mask, "sequence_mean") for mask in masks])
    alone = [
        expert(replace(take(x, np.array([i])), mask=m[None], num_tokens=m.sum()), weighting).loss
        for i, m in zip(kept, masks, strict=True)
    ]
    both = expert(replace(take(x, np.array(kept)), mask=weights, num_tokens=float(weights.sum())), weighting)
    assert both.loss == pytest.approx(sum(alone) / len(alone), rel=1e-5, abs=1e-7)
