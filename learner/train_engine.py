"""One optimizer step of CHORD with DeepSpeed, on any number of ranks.

The gradient of a step is the same for any split into micro-batches and ranks: each loss is a sum divided by the token
counts of the whole step, and what DeepSpeed divides by (the rank count; accumulation steps are set to 1) is
multiplied back.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from common.errors import OperatorError
from learner.adapters import trained_parameters
from learner.batch import TrainBatch, build_batch
from learner.objective.chord import chord_loss, effective_mu, expert_loss
from learner.objective.importance import Correction, effective_sample_frac
from learner.objective.policy import policy_loss
from learner.policy_model import PolicyModel
from learner.ranks import Ranks
from learner.shards import Sharding, forget_module, square_of_shards, whole

Forward = Callable[[TrainBatch], tuple[Tensor, Tensor]]
"""Log-probs and entropies, both [B, T]."""

LAYOUT = "layout.json"
SHARED_MEMORY_OP = "deepspeed_shm_comm"


@dataclass(frozen=True)
class Objective:
    """What is fixed in the objective for a whole run."""

    correction: Correction
    expert_weighting: Literal["phi", "is", "none"]


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and what DeepSpeed is told; see the configuration's section `learner`."""

    weight_decay: float
    adam_betas: tuple[float, float]
    max_grad_norm: float
    sharding: Sharding


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step computed, over all ranks."""

    num_policy_tokens: int
    num_expert_tokens: int
    metrics: dict[str, float]
    """Means over policy tokens (`policy_…`) and expert tokens (`expert_…`), weighted as the loss weighs them; the
    losses, the gradient norm, and what was measured at an interval."""
    logprobs: Tensor
    """float32 on the CPU; of this rank alone, as its forward found them: [B, T] of each batch, flat, in their order."""

    @property
    def fields(self) -> dict[str, float | None]:
        """The part of a step record that tells of the loss: of a half without a token nothing is known."""
        ratio_mean, ratio_sq_mean = self.metrics["policy_ratio_mean"], self.metrics["policy_ratio_sq_mean"]
        known = {**self.metrics, "policy_ess_frac": effective_sample_frac(ratio_mean, ratio_sq_mean)}
        counts = {"policy": self.num_policy_tokens, "expert": self.num_expert_tokens}
        is_empty = tuple(f"{half}_" for half, count in counts.items() if not count)
        fields = {name: None if name.startswith(is_empty) else value for name, value in known.items()}
        return fields | {f"num_{half}_tokens": count for half, count in counts.items()}


@dataclass(frozen=True)
class Denominators:
    """Sums of loss weights over the whole optimizer step, all ranks together: what each half is divided by."""

    policy: float
    expert: float


@dataclass(frozen=True)
class Losses:
    """Both halves of one micro-batch."""

    policy: Tensor
    expert: Tensor
    logprobs: Tensor
    metrics: dict[str, Tensor]


Half = Callable[[Losses], Tensor]


class TrainEngine:
    """The policy under training. Every rank makes one and calls its methods in the same order."""

    def __init__(
        self, model: PolicyModel, ranks: Ranks, device: torch.device, objective: Objective, settings: OptimizerSettings
    ) -> None:
        import deepspeed

        # Not compiled at the first start: a learner that is killed meanwhile leaves a lock for which every later one
        # waits for ever, and it speeds up inference only.
        deepspeed.ops.__compatible_ops__[SHARED_MEMORY_OP] = False
        self._objective = objective
        self._ranks = ranks
        self._device = device
        self._sharding = settings.sharding
        self._parameters: list[Any] = [p for p in model.parameters() if p.requires_grad]
        config = _deepspeed_config(settings, dtype=self._parameters[0].dtype, on_cpu=device.type == "cpu")
        if self._sharding.shards_parameters:
            # Now, one by one, as the device may not hold all parameters, where `model.to` would put them.
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
        engine, optimizer, *_ = deepspeed.initialize(
            model=model.to(device), model_parameters=self._parameters, config=config, dist_init_required=False
        )
        if self._sharding.shards_parameters:
            for parameter in model.head.linear.parameters():
                deepspeed.zero.register_external_parameter(model.head, parameter)
        self._engine: Any = engine
        self._optimizer: Any = optimizer
        self._model = model

    def step(self, batches: Sequence[TrainBatch], *, mu: float, lr: float, measures_halves: bool = False) -> StepReport:
        """Take one optimizer step on this rank's share of it.

        `measures_halves` adds the gradient norms of both halves and effective μ.
        """
        denominators, num_tokens = self._count(batches)
        num_micro_batches = max(self._most(len(batches)), 1)
        empty = [build_batch([]) for _ in range(num_micro_batches - len(batches))]
        padded = [batch.to(self._device) for batch in (*batches, *empty)]
        halves = self._measure_halves(padded, denominators, mu) if measures_halves else {}
        totals: dict[str, float] = {}
        found = [torch.zeros(0)]
        for number, batch in enumerate(padded, start=1):
            losses = self._losses(self._engine, batch, denominators)
            loss = chord_loss(losses.policy, losses.expert, mu=mu)
            self._engine.set_gradient_accumulation_boundary(number == num_micro_batches)
            # The second term gives an empty batch something to differentiate.
            self._engine.backward((loss + 0.0 * losses.logprobs.sum()) * self._ranks.count)
            for name, value in {"loss": loss.detach(), **losses.metrics}.items():
                totals[name] = totals.get(name, 0.0) + float(value)
            if number <= len(batches):
                found.append(losses.logprobs.detach().flatten().cpu())
        grad_norm = self._take(lr)
        summed = self._ranks.add_up(list(totals.values()))
        metrics = {**dict(zip(totals, summed, strict=True)), "grad_norm": grad_norm, **halves}
        return StepReport(*num_tokens, metrics, torch.cat(found))

    def _count(self, batches: Sequence[TrainBatch]) -> tuple[Denominators, tuple[int, int]]:
        """Sums of loss weights, and numbers of loss-bearing tokens (policy, expert), over all ranks."""
        masks = [(batch.policy_mask, batch.expert_mask) for batch in batches]
        counts = [
            sum(float(policy.sum(dtype=torch.float64)) for policy, _ in masks),
            sum(float(expert.sum(dtype=torch.float64)) for _, expert in masks),
            sum(int(policy.count_nonzero()) for policy, _ in masks),
            sum(int(expert.count_nonzero()) for _, expert in masks),
        ]
        policy, expert, num_policy_tokens, num_expert_tokens = self._ranks.add_up(counts)
        return Denominators(policy, expert), (int(num_policy_tokens), int(num_expert_tokens))

    def _losses(self, forward: Forward, batch: TrainBatch, denominators: Denominators) -> Losses:
        logprobs, entropies = forward(batch)
        policy, policy_metrics = policy_loss(
            logprobs, batch.behavior_logprobs, batch.advantages, batch.policy_mask,
            correction=self._objective.correction, num_tokens=denominators.policy,
        )  # fmt: skip
        expert, expert_metrics = expert_loss(
            logprobs, batch.expert_mask, weighting=self._objective.expert_weighting, num_tokens=denominators.expert
        )
        metrics = {
            "policy_loss": policy.detach(),
            "expert_loss": expert.detach(),
            "policy_entropy": (entropies * batch.policy_mask).sum() / max(denominators.policy, 1.0),
        }
        metrics |= {f"policy_{name}": value for name, value in policy_metrics.items()}
        metrics |= {f"expert_{name}": value for name, value in expert_metrics.items()}
        return Losses(policy, expert, logprobs, metrics)

    def _measure_halves(self, batches: Sequence[TrainBatch], denominators: Denominators, mu: float) -> dict[str, float]:
        """Gradient norms of the two halves, each alone; what the step then accumulates is not touched."""
        with_policy = [batch for batch in batches if batch.policy_mask.any()]
        with_expert = [batch for batch in batches if batch.expert_mask.any()]
        norm_of = self._norm_of_shards if self._sharding.shards_parameters else self._norm_of
        policy = norm_of(with_policy, denominators, lambda losses: losses.policy)
        expert = norm_of(with_expert, denominators, lambda losses: losses.expert)
        return {
            "policy_grad_norm": policy,
            "expert_grad_norm": expert,
            "mu_effective": effective_mu(mu, policy_norm=policy, expert_norm=expert),
        }

    def _norm_of(self, batches: Sequence[TrainBatch], denominators: Denominators, half: Half) -> float:
        """Norm of the gradient of a half of the loss summed over all ranks' batches."""
        totals = [torch.zeros_like(p, dtype=torch.float32) for p in self._parameters]
        for batch in batches:
            # The model itself, as DeepSpeed's forward would hook its own backward onto it.
            loss = half(self._losses(self._model, batch, denominators))
            grads = torch.autograd.grad(loss, self._parameters, allow_unused=True)
            for total, grad in zip(totals, grads, strict=True):
                if grad is not None:
                    total += grad
        self._ranks.add_up_tensors(totals)
        return float(torch.nn.utils.get_total_norm(totals))

    def _norm_of_shards(self, batches: Sequence[TrainBatch], denominators: Denominators, half: Half) -> float:
        """The same where no rank may hold a whole gradient: DeepSpeed accumulates it, for a step that is not taken."""
        num_empty = self._most(len(batches)) - len(batches)
        padded = [*batches, *[build_batch([]).to(self._device)] * num_empty]
        for number, batch in enumerate(padded, start=1):
            losses = self._losses(self._engine, batch, denominators)
            self._engine.set_gradient_accumulation_boundary(number == len(padded))
            self._engine.backward(self._ranks.count * (half(losses) + 0.0 * losses.logprobs.sum()))
        square = square_of_shards(self._parameters) if padded else 0.0
        self._optimizer.zero_grad()
        return math.sqrt(self._ranks.add_up([square])[0])

    def _most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        slots = [0.0] * self._ranks.count
        slots[self._ranks.rank] = float(number)
        return int(max(self._ranks.add_up(slots)))

    def _take(self, lr: float) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        norm = _plain_grad_norm(self._model)
        self._engine.step()
        sharded_norm = self._engine.get_global_grad_norm()
        return float(norm if sharded_norm is None else sharded_norm)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What is trained, by its published name, on rank 0's CPU; empty elsewhere. Every rank must call it."""
        # Each parameter once: a head tied to the embedding comes with the embedding.
        return {
            name: parameter.to(device="cpu", dtype=dtype, copy=True).contiguous()
            for name, parameter in whole(trained_parameters(self._model.lm))
            if self._ranks.is_first
        }

    def parameters_hash(self) -> str:
        """Names what is trained to the bit, on rank 0. Every rank must call it."""
        digest = hashlib.blake2b(digest_size=16)
        for name, parameter in whole(trained_parameters(self._model.lm)):
            if self._ranks.is_first:
                digest.update(name.encode())
                digest.update(parameter.cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    @property
    def _layout(self) -> dict[str, int]:
        """What the shards in a checkpoint depend on, by configuration key."""
        return {"learner.zero_stage": self._sharding.zero_stage, "learner.num_ranks": self._ranks.count}

    def save(self, folder: Path) -> None:
        """Write what is trained, optimizer and random states of this rank into `folder`. Every rank must call it."""
        self._engine.save_checkpoint(
            str(folder), tag="state", client_state={"torch_rng": torch.get_rng_state()}, save_latest=False,
            exclude_frozen_parameters=True,
        )  # fmt: skip
        if self._ranks.is_first:
            (folder / LAYOUT).write_text(json.dumps(self._layout))

    def close(self) -> None:
        """Free what DeepSpeed took."""
        self._engine.destroy()
        if self._sharding.shards_parameters:
            forget_module()

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote. Raises OperatorError where its shards are not those of these ranks."""
        found = json.loads((folder / LAYOUT).read_text())
        if found != self._layout:
            raise OperatorError(f"{folder}: got {self._layout}, expected {found} as it was written with")
        is_whole = all(p.requires_grad for p in self._model.parameters())
        loaded, client_state = self._engine.load_checkpoint(str(folder), tag="state", load_module_strict=is_whole)
        if loaded is None:
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint in it")
        torch.set_rng_state(client_state["torch_rng"])


def _plain_grad_norm(model: PolicyModel) -> float:
    """Norm of the unsharded gradients, where there are such (ZeRO 0)."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else float("nan")


def _deepspeed_config(settings: OptimizerSettings, *, dtype: torch.dtype, on_cpu: bool) -> dict[str, Any]:
    adam = {
        "lr": 0.0, "betas": list(settings.adam_betas), "weight_decay": settings.weight_decay,
        # DeepSpeed's own Adam for CPUs would be compiled at the first start, behind such a lock as SHARED_MEMORY_OP.
        "torch_adam": on_cpu or settings.sharding.offload == "optimizer",
    }  # fmt: skip
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm,
        "zero_optimization": settings.sharding.section(),
        "zero_force_ds_cpu_optimizer": False,
        "optimizer": {"type": "AdamW", "params": adam},
        "bf16": {"enabled": dtype == torch.bfloat16},
        "steps_per_print": 1 << 30,
        "wall_clock_breakdown": False,
    }
