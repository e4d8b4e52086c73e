"""Rows and engines for tests of one optimizer step, made alike in every process."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from learner.batch import build_batch
from learner.objective.importance import Correction
from learner.policy_model import load_policy_model
from learner.ranks import Ranks
from learner.rows import Branch, Row, deal, micro_batches, split_to_budget, unshare
from learner.train_engine import Objective, OptimizerSettings, StepReport, TrainEngine

VOCABULARY = 258
MU, LR = 0.4, 1e-3
CPU = torch.device("cpu")


def some_rows(num_groups: int = 3, num_experts: int = 4, *, temperature: float = 0.7) -> list[Row]:
    """Groups and demonstrations of many lengths, with masked tokens inside answers; the same ones in every process."""
    random = np.random.default_rng(7)

    def branch(*, is_expert: bool) -> Branch:
        size = int(random.integers(2, 12))
        mask = np.ones(size, dtype=np.float32)
        if not is_expert and size > 4:
            mask[2] = 0.0  # a reply of the environment
        behavior = np.full(size, np.nan) if is_expert else np.where(mask > 0, -4.0 + random.normal(size=size), np.nan)
        advantage = float("nan") if is_expert else float(random.normal())
        return Branch(
            random.integers(0, VOCABULARY, size).astype(np.int32), mask, behavior.astype(np.float32), advantage,
            1.0 if is_expert else temperature, is_expert,
        )  # fmt: skip

    def row(num_branches: int, *, is_expert: bool) -> Row:
        prompt = random.integers(0, VOCABULARY, int(random.integers(3, 20))).astype(np.int32)
        return Row(prompt, tuple(branch(is_expert=is_expert) for _ in range(num_branches)))

    groups = [row(4, is_expert=False) for _ in range(num_groups)]
    return groups + [row(1, is_expert=True) for _ in range(num_experts)]


def make_engine(model_path: Path, ranks: Ranks, *, zero_stage: int = 0) -> TrainEngine:
    model = load_policy_model(model_path, dtype=torch.float32, head_chunk_tokens=16)
    settings = OptimizerSettings(weight_decay=0.0, adam_betas=(0.9, 0.999), max_grad_norm=1.0, zero_stage=zero_stage)
    return TrainEngine(model, ranks, CPU, Objective(Correction(kind="tis"), "phi"), settings)


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
