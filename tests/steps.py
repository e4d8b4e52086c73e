"""Rows and engines for tests of one optimizer step, made alike in every process."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from deepspeed.utils import safe_get_full_optimizer_state
from numpy.typing import NDArray
from torch import Tensor

from learner.adapters import Lora, trained_parameters
from learner.batch import TrainBatch, build_batch
from learner.objective.importance import Correction
from learner.policy_model import PolicyModel, load_policy_model
from learner.ranks import Ranks
from learner.rows import Branch, Row, deal, micro_batches, split_to_budget, unshare
from learner.shards import Sharding
from learner.train_engine import Objective, OptimizerSettings, StepReport, TrainEngine
from tests import reference
from tests.judge import Judge

VOCABULARY = 258
MU, LR = 0.4, 1e-3
CPU = torch.device("cpu")
PLAIN = Sharding()
LORA = Lora(rank=4, alpha=6.0, targets=())

Weights = Literal["ones", "fractions", "sequence_mean"]
"""Of loss-bearing tokens: all alike, any, or those of each sequence adding up to 1."""


def some_rows(num_groups: int = 3, num_experts: int = 4, *, temperature: float = 0.7) -> list[Row]:
    """Groups and demonstrations of many lengths, with masked tokens inside answers; the same ones in every process."""
    numbers = np.random.default_rng(7)

    def branch(*, is_expert: bool) -> Branch:
        size = int(numbers.integers(2, 12))
        mask = np.ones(size, dtype=np.float32)
        if not is_expert and size > 4:
            mask[2] = 0.0  # a reply of the environment
        behavior = np.full(size, np.nan) if is_expert else np.where(mask > 0, -4.0 + numbers.normal(size=size), np.nan)
        advantage = float("nan") if is_expert else float(numbers.normal())
        return Branch(
            numbers.integers(0, VOCABULARY, size).astype(np.int32), mask, behavior.astype(np.float32), advantage,
            1.0 if is_expert else temperature, is_expert,
        )  # fmt: skip

    def row(num_branches: int, *, is_expert: bool) -> Row:
        prompt = numbers.integers(0, VOCABULARY, int(numbers.integers(3, 20))).astype(np.int32)
        return Row(prompt, tuple(branch(is_expert=is_expert) for _ in range(num_branches)))

    groups = [row(4, is_expert=False) for _ in range(num_groups)]
    return groups + [row(1, is_expert=True) for _ in range(num_experts)]


def sharding_of(zero_stage: int) -> Sharding:
    """In stage 3 even norms are dealt out, so that every parameter must be gathered."""
    return Sharding(zero_stage, max_whole_entries=0)


def make_engine(model_path: Path, ranks: Ranks, **kind: Any) -> TrainEngine:
    settings = OptimizerSettings(0.0, (0.9, 0.999), max_grad_norm=1.0, sharding=kind.pop("sharding", PLAIN))
    return TrainEngine(make_policy(model_path, **kind), ranks, CPU, Objective(Correction(kind="tis"), "phi"), settings)


def make_policy(model_path: Path, *, recompute_activations: bool = False, lora: Lora | None = None) -> PolicyModel:
    """Adapters are filled with numbers, the same ones in every process: those that peft begins with change nothing."""
    model = load_policy_model(
        model_path, dtype=torch.float32, head_chunk_tokens=16, recompute_activations=recompute_activations, lora=lora
    )
    if lora:
        numbers = torch.Generator().manual_seed(3)
        for _, parameter in trained_parameters(model.lm):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=numbers)
    return model


def take_steps(
    engine: TrainEngine,
    ranks: Ranks,
    rows: list[Row],
    *,
    budget: int = 4096,
    shares_prompts: bool = True,
    count: int = 2,
) -> StepReport:
    """A few optimizer steps on this rank's share of `rows`."""
    rows = rows if shares_prompts else unshare(rows)
    parts = [part for row in rows for part in split_to_budget(row, budget)]
    share = deal(parts, ranks.count)[ranks.rank]
    batches = [build_batch(some) for some in micro_batches(share, budget)]
    for _ in range(count):
        report = engine.step(batches, mu=MU, lr=LR)
    return report


def weights_of(engine: TrainEngine) -> dict[str, Tensor]:
    return engine.tensors(torch.float32)


@dataclass(frozen=True)
class Cut:
    """How the rows of one optimizer step become micro-batches; no gradient may depend on it."""

    budget: int = 4096
    shares_prompts: bool = True
    order_seed: int | None = None
    """Shuffles the rows, and the micro-batches once more; None leaves them as they come."""
    padding_seed: int | None = None
    """Sends what lies past the ends of prompts and branches to any place; None leaves it at the first token."""
    num_empty: int = 0
    """Micro-batches without any row among the others."""

    def batches(self, rows: Sequence[Row]) -> list[TrainBatch]:
        rows = list(rows) if self.shares_prompts else unshare(rows)
        parts = [part for row in rows for part in split_to_budget(row, self.budget)]
        shuffle = random.Random(self.order_seed).shuffle if self.order_seed is not None else lambda _: None
        shuffle(parts)
        batches = [build_batch(some) for some in micro_batches(parts, self.budget)] + [build_batch([])] * self.num_empty
        shuffle(batches)
        seed = self.padding_seed
        return batches if seed is None else [with_other_padding(batch, seed=seed) for batch in batches]


def with_other_padding(batch: TrainBatch, *, seed: int) -> TrainBatch:
    """The same batch; what lies past the ends of prompts and branches is taken from anywhere."""
    places = torch.cat([batch.prompts.flatten(), batch.branches.flatten()])
    is_used = torch.zeros(len(places), dtype=torch.bool).index_fill(0, batch.slots, True)
    anywhere = torch.from_numpy(np.random.default_rng(seed).integers(0, len(batch.tokens), len(places)))
    prompts, branches = torch.where(is_used, places, anywhere).split([batch.prompts.numel(), batch.branches.numel()])
    return replace(batch, prompts=prompts.view_as(batch.prompts), branches=branches.view_as(batch.branches))


def make_gauge(model_path: Path, ranks: Ranks, **kind: Any) -> TrainEngine:
    """An engine that shows gradients: Adam's first moment without memory is the gradient that its optimizer was given.

    At a learning rate of 0 the weights stay as they are, so that one engine measures any number of steps.
    """
    settings = OptimizerSettings(0.0, (0.0, 0.999), max_grad_norm=1e9, sharding=kind.pop("sharding", PLAIN))
    return TrainEngine(make_policy(model_path, **kind), ranks, CPU, Objective(Correction(), "phi"), settings)


def measure(
    gauge: TrainEngine,
    batches: Sequence[TrainBatch],
    *,
    objective: Objective,
    mu: float,
    measures_halves: bool = False,
) -> tuple[dict[str, Tensor], StepReport]:
    """The gradient of one optimizer step by parameter, and its report. Every rank must call it."""
    internals: Any = gauge
    internals._objective = objective
    report = gauge.step(batches, mu=mu, lr=0.0, measures_halves=measures_halves)
    gradient = {name: _first_moment(internals, p) for name, p in trained_parameters(internals._model.lm)}
    return gradient, report


def _first_moment(gauge: Any, parameter: Tensor) -> Tensor:
    if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id"):
        return safe_get_full_optimizer_state(parameter, "exp_avg").clone()
    return gauge._optimizer.state[parameter]["exp_avg"].clone()


def random_rows(
    judge: Judge,
    *,
    seed: int,
    num_groups: int,
    num_experts: int,
    spread: float,
    temperature: float,
    weights: Weights = "ones",
) -> list[Row]:
    """Groups of two to four and demonstrations: answers from one token on, masks with holes, NaN under every hole.

    Behaviour log-probs are the policy's own, off by `spread`. `weights` says what stands in the masks.
    """
    numbers = np.random.default_rng(seed)

    def branch(prompt: NDArray[np.int32], *, is_expert: bool) -> Branch:
        size = int(numbers.integers(1, 10))
        mask = numbers.uniform(0.1, 2.0, size) if weights == "fractions" else np.ones(size)
        holes = numbers.random(size) < (0.3 if numbers.random() < 0.5 else 0.0)
        holes[int(numbers.integers(size))] = False
        mask = np.where(holes, 0.0, mask)
        mask = reference.loss_weights(mask, weights).astype(np.float32)
        tokens = numbers.integers(0, VOCABULARY, size).astype(np.int32)
        nan = np.full(size, np.nan, dtype=np.float32)
        if is_expert:
            return Branch(tokens, mask, nan, float("nan"), 1.0, is_expert=True)
        blank = Branch(tokens, mask, nan, float(numbers.normal()), temperature, is_expert=False)
        own = judge.logprobs(Row(prompt, (blank,)), blank)[0].detach().numpy()
        behavior = np.minimum(own + spread * numbers.normal(size=size), 0.0)
        return replace(blank, behavior_logprobs=np.where(holes, np.nan, behavior).astype(np.float32))

    def row(num_branches: int, *, is_expert: bool) -> Row:
        prompt = numbers.integers(0, VOCABULARY, int(numbers.integers(1, 12))).astype(np.int32)
        return Row(prompt, tuple(branch(prompt, is_expert=is_expert) for _ in range(num_branches)))

    groups = [row(int(numbers.integers(2, 5)), is_expert=False) for _ in range(num_groups)]
    return groups + [row(1, is_expert=True) for _ in range(num_experts)]


def check_restores_to_the_bit(engine: TrainEngine, other: TrainEngine, ranks: Ranks, folder: Path) -> None:
    """What `engine` saves makes `other` the same, and its next step the same."""
    take_steps(engine, ranks, some_rows(), count=2)
    engine.save(folder)
    saved = engine.parameters_hash()
    take_steps(engine, ranks, some_rows(), count=1)
    other.restore(folder)
    assert other.parameters_hash() == saved != engine.parameters_hash()
    take_steps(other, ranks, some_rows(), count=1)
    assert other.parameters_hash() == engine.parameters_hash()
