"""The objective gives the golden losses and gradients, in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learner.objective.advantages import group_advantages
from learner.objective.chord import expert_loss, mu_at
from learner.objective.importance import Correction
from learner.objective.policy import policy_loss

Entry = dict[str, Any]
GOLDEN: dict[str, list[Entry]] = json.loads((Path(__file__).parent / "golden" / "objective.json").read_text())


def assert_golden(loss: Tensor, grad: Tensor | None, entry: Entry) -> None:
    """Within 1e-5, and zero exactly where the golden gradient is zero."""
    expected = torch.tensor(entry["grad"])
    assert grad is not None
    assert loss.item() == pytest.approx(entry["loss"], rel=1e-5, abs=1e-7)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(grad != 0, expected != 0)


def policy_name(entry: Entry) -> str:
    return entry["correction"]["kind"] + ("" if entry["proximal_logprobs"] is None else "-proximal")


@pytest.mark.parametrize("entry", GOLDEN["policy_loss"], ids=policy_name)
def test_policy_loss_is_golden(entry: Entry):
    logprobs = torch.tensor(entry["logprobs"]).requires_grad_()
    proximal = entry["proximal_logprobs"]
    loss, _ = policy_loss(
        logprobs,
        torch.tensor(entry["behavior_logprobs"]),
        torch.tensor(entry["advantages"]),
        torch.tensor(entry["mask"]),
        correction=Correction(**{**entry["correction"], "band": tuple(entry["correction"]["band"])}),
        num_tokens=entry["num_tokens"],
        proximal_logprobs=None if proximal is None else torch.tensor(proximal),
    )
    loss.backward()
    assert_golden(loss, logprobs.grad, entry)


@pytest.mark.parametrize("entry", GOLDEN["expert_loss"], ids=lambda entry: entry["weighting"])
def test_expert_loss_is_golden(entry: Entry):
    logprobs = torch.tensor(entry["logprobs"]).requires_grad_()
    loss, _ = expert_loss(
        logprobs, torch.tensor(entry["mask"]), weighting=entry["weighting"], num_tokens=entry["num_tokens"]
    )
    loss.backward()
    assert_golden(loss, logprobs.grad, entry)


@pytest.mark.parametrize("entry", GOLDEN["advantages"], ids=lambda entry: entry["scale"])
def test_group_advantages_are_golden(entry: Entry):
    A = group_advantages(torch.tensor(entry["rewards"]), scale=entry["scale"], eps=entry["eps"])
    torch.testing.assert_close(A, torch.tensor(entry["advantages"]), rtol=1e-5, atol=1e-6)


def test_mu_is_golden():
    for entry in GOLDEN["mu_at"]:
        schedule = {name: value for name, value in entry.items() if name not in ("step", "mu")}
        assert mu_at(entry["step"], **schedule) == pytest.approx(entry["mu"], abs=1e-12), entry
