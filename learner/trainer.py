"""The trainer: one optimizer step from rows; the same numbers whether the step is new, or replayed."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.config.schema import Config
from common.errors import OperatorError
from common.weights.policy import pack_adapters
from learner.adapters import Lora
from learner.batch import BranchValues, build_batch, num_places, take_apart
from learner.objective.importance import Correction
from learner.policy_model import load_policy_model, resolve_compute_dtype
from learner.ranks import Ranks
from learner.rows import Row, deal, micro_batches, split_to_budget, unshare
from learner.schedule import lr_of
from learner.shards import Sharding, check_offload
from learner.train_engine import Objective, OptimizerSettings, StepReport, TrainEngine

PUBLISHED_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Taken:
    """One optimizer step that was taken."""

    report: StepReport
    lr: float
    train_s: float
    logprobs: BranchValues
    """The policy's, before the step, as its forward found them; 0 where the mask is. Empty but on rank 0."""


def prepare_device(config: Config) -> torch.device:
    """The device of this rank; threads and seed as configured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.learner.num_threads:
        torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.run.seed)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return device


class Trainer:
    """The policy under training and its optimizer; every rank makes one and calls its methods in the same order."""

    def __init__(self, config: Config, ranks: Ranks, device: torch.device) -> None:
        self._config = config
        self._ranks = ranks
        self._device = device
        learner = config.learner
        self._lora = Lora(learner.lora_rank, learner.lora_alpha, learner.lora_targets) if learner.lora_rank else None
        self._engine = self._make_engine(weights=None)

    def _make_engine(self, *, weights: Path | None) -> TrainEngine:
        learner, algorithm = self._config.learner, self._config.algorithm
        model = load_policy_model(
            Path(self._config.model.path),
            dtype=getattr(torch, self._config.model.dtype),
            head_chunk_tokens=learner.head_chunk_tokens,
            recompute_activations=learner.recompute_activations,
            weights=weights,
            lora=self._lora,
        )
        model.compute_dtype = resolve_compute_dtype(learner.compute_dtype, self._device)
        correction = Correction(
            kind=algorithm.correction, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high, cap=algorithm.cap,
            band=algorithm.band,
        )  # fmt: skip
        sharding = Sharding(learner.zero_stage, learner.overlap_comm, learner.offload)
        check_offload(sharding, self._device)
        settings = OptimizerSettings(learner.weight_decay, learner.adam_betas, learner.max_grad_norm, sharding)
        objective = Objective(correction, algorithm.expert_weighting)
        return TrainEngine(model, self._ranks, self._device, objective, settings)

    def begin_anew(self, weights: Path) -> None:
        """Go on from a published version's weights with a new optimizer, as a run of its own would."""
        self._engine.close()
        self._engine = self._make_engine(weights=weights)

    def take(self, step: int, rows: Sequence[Row] | None, *, mu: float) -> Taken:
        """Take optimizer step `step` (counted from 0); only rank 0 passes its rows, all pass μ.

        Raises OperatorError, on every rank, where loss or gradient norm is not finite.
        """
        shares = self._deal(rows) if rows is not None else []
        batches = self._ranks.deal_batches([[build_batch(some) for some in share] for share in shares] or None)
        lr, every = lr_of(self._config, step), self._config.learner.effective_mu_every_steps
        started = time.monotonic()
        report = self._engine.step(batches, mu=mu, lr=lr, measures_halves=every > 0 and step % every == 0)
        _check_finite(step, report)
        return Taken(report, lr, time.monotonic() - started, self._collect(report.logprobs, shares))

    def _deal(self, rows: Sequence[Row]) -> list[list[list[Row]]]:
        """The micro-batches of each rank."""
        budget = self._config.learner.micro_batch_tokens
        rows = rows if self._config.learner.share_prompts else unshare(rows)
        rows = [part for row in rows for part in split_to_budget(row, budget)]
        return [micro_batches(share, budget) for share in deal(rows, self._ranks.count)]

    def _collect(self, logprobs: Tensor, shares: list[list[list[Row]]]) -> BranchValues:
        """Bring all ranks' log-probs back to the branches that they were dealt."""
        sizes = [[num_places(some) for some in share] for share in shares]
        collected = self._ranks.collect(logprobs, [sum(own) for own in sizes])
        found: BranchValues = {}
        for values, share, own in zip(collected, shares, sizes, strict=True):
            for part, some in zip(values.split(own), share, strict=True):
                found |= take_apart(part, some)
        return found

    def published_tensors(self) -> dict[str, Tensor]:
        """What a version consists of, on rank 0; empty elsewhere. Every rank must call it."""
        if not self._lora:
            return self._engine.tensors(PUBLISHED_DTYPE)
        adapters = self._engine.tensors(torch.float32)  # few, and what they are added to may be float32
        base = Path(self._config.model.path)
        return pack_adapters(adapters, base=base, scale=self._lora.scale) if adapters else {}

    def parameters_hash(self) -> str:
        """Names the learner's parameters to the bit. Every rank must call it."""
        return self._engine.parameters_hash()

    def save(self, folder: Path) -> None:
        self._engine.save(folder)

    def restore(self, folder: Path) -> None:
        self._engine.restore(folder)


def _check_finite(step: int, report: StepReport) -> None:
    """What such a step leaves is no policy, and every checkpoint of it would push out a good one."""
    loss, norm = report.metrics["loss"], report.metrics["grad_norm"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise OperatorError(
            f"step {step + 1}: got loss {loss:g} and gradient norm {norm:g}, expected finite numbers; nothing is kept "
            "of it: go back to a checkpoint with chord-learner --rewind and lower learner.lr"
        )
