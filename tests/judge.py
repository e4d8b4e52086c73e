"""The slow judge of an optimizer step: branch by branch, neither packed nor padded, by the NumPy transcription.

The model's own forward in float64 gives each branch's log-probs, `tests/reference.py` the slope of the loss on each of
them, and autograd nothing but the chain from there to the parameters. Nothing of the learner is used but its rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from learner.objective.importance import Correction
from learner.rows import Branch, Row
from tests import reference
from tests.reference import Outcome


@dataclass(frozen=True)
class Verdict:
    """What one optimizer step must come out as."""

    gradient: dict[str, Tensor]
    """By parameter, float64."""
    metrics: dict[str, float]


class Judge:
    """A model in float64, asked for one branch at a time."""

    def __init__(self, model_path: Path) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64)

    def logprobs(self, row: Row, branch: Branch) -> tuple[Tensor, Tensor]:
        """([T] log-probs with gradient, [T] entropies) of a branch, at its temperature."""
        tokens = torch.from_numpy(np.concatenate([row.prompt, branch.tokens]).astype(np.int64))
        logits = self._model(input_ids=tokens[None], use_cache=False).logits[0, len(row.prompt) - 1 : -1]
        scores = (logits / branch.temperature).log_softmax(-1)
        picked = scores.gather(1, tokens[len(row.prompt) :, None])[:, 0]
        return picked, -(scores.exp() * scores).sum(-1).detach()

    def step(self, rows: Sequence[Row], *, correction: Correction, weighting: str, mu: float) -> Verdict:
        """Gradient and metrics of one optimizer step on all of `rows`."""
        self._model.zero_grad()
        branches = [(row, branch) for row in rows for branch in row.branches]
        num_policy = sum(float(branch.mask.sum()) for _, branch in branches if not branch.is_expert)
        num_expert = sum(float(branch.mask.sum()) for _, branch in branches if branch.is_expert)
        totals: dict[str, float] = {}
        for row, branch in branches:
            logprobs, entropies = self.logprobs(row, branch)
            if branch.is_expert:
                outcome = _expert(logprobs, branch, weighting, num_expert)
                metrics, weight = {"loss": outcome.loss, **outcome.metrics}, mu
            else:
                outcome = _policy(logprobs, branch, correction, num_policy)
                entropy = float((entropies.numpy() * branch.mask).sum()) / max(num_policy, 1.0)
                metrics, weight = {"loss": outcome.loss, "entropy": entropy, **outcome.metrics}, 1 - mu
            logprobs.backward(weight * torch.from_numpy(outcome.grad[0]))
            half = "expert" if branch.is_expert else "policy"
            for name, value in metrics.items():
                totals[f"{half}_{name}"] = totals.get(f"{half}_{name}", 0.0) + value
        totals["loss"] = (1 - mu) * totals.get("policy_loss", 0.0) + mu * totals.get("expert_loss", 0.0)
        gradient = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
            for name, parameter in self._model.named_parameters()
        }
        return Verdict(gradient, totals)


class AdapterJudge(Judge):
    """A judge of a model that was merged of W + scale · B · A: asked for what A and B get of the gradient of W."""

    def __init__(self, merged: Path, adapters: Mapping[str, Tensor], scale: float) -> None:
        super().__init__(merged)
        self._adapters = {name: tensor.double() for name, tensor in adapters.items()}
        self._scale = scale

    def step(self, rows: Sequence[Row], *, correction: Correction, weighting: str, mu: float) -> Verdict:
        verdict = super().step(rows, correction=correction, weighting=weighting, mu=mu)
        gradient: dict[str, Tensor] = {}
        for name in self._adapters:
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            down, up = (self._adapters[f"{module}.{one}.weight"] for one in ("lora_A", "lora_B"))
            slope = self._scale * verdict.gradient[f"{module}.weight"]
            gradient[name] = up.T @ slope if kind == "lora_A" else slope @ down.T
        return Verdict(gradient, verdict.metrics)


def _policy(logprobs: Tensor, branch: Branch, correction: Correction, num_tokens: float) -> Outcome:
    return reference.policy(
        logprobs.detach().numpy()[None], branch.behavior_logprobs.astype(np.float64)[None],
        np.array([branch.advantage]), branch.mask.astype(np.float64)[None], num_tokens, **asdict(correction),
    )  # fmt: skip


def _expert(logprobs: Tensor, branch: Branch, weighting: str, num_tokens: float) -> Outcome:
    return reference.expert(
        logprobs.detach().numpy()[None], branch.mask.astype(np.float64)[None], weighting, num_tokens
    )
