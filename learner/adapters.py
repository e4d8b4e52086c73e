"""LoRA: adapters on the policy's linear layers, trained in place of its weights; peft puts them in."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.errors import OperatorError
from common.weights.policy import check_adapters, shapes_of_base

NAME = "default"
"""peft's name of the one adapter that a layer has here."""


@dataclass(frozen=True)
class Lora:
    """Of which kind the adapters are; see the configuration's section `learner`."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of linear layers; empty: every one but the head."""

    @property
    def scale(self) -> float:
        """What B · A is multiplied by."""
        return self.alpha / self.rank


def add_adapters(lm: Any, lora: Lora, *, base: Path) -> None:
    """Freeze `lm` and put adapters that change nothing yet beside its linear layers.

    Raises OperatorError where a target is no linear layer whose weight lies in the folder `base`.
    """
    from peft import LoraConfig, inject_adapter_in_model

    known = _linear_names(lm)
    if unknown := [target for target in lora.targets if target not in known]:
        raise OperatorError(
            f'learner.lora_targets: got "{unknown[0]}", expected some of {type(lm).__name__}\'s linear layers: '
            f"{', '.join(known)}"
        )
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets) or "all-linear", lora_dropout=0.0
    )
    inject_adapter_in_model(config, lm)
    dtype = next(parameter.dtype for parameter in lm.parameters() if not parameter.requires_grad)
    for parameter in lm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    shapes = {name: tuple(parameter.shape) for name, parameter in trained_parameters(lm)}
    try:
        check_adapters(shapes, shapes_of_base(base), where="learner.lora_targets")
    except ValueError as error:
        raise OperatorError(f"{error} in {base}") from error


def trained_parameters(lm: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, by the name that it is published under: an adapter of peft's, or the model's own weights."""
    for name, parameter in lm.named_parameters():
        if parameter.requires_grad:
            yield re.sub(rf"\.(lora_[AB])\.{NAME}\.weight$", r".\1.weight", name), parameter


def _linear_names(lm: Any) -> list[str]:
    """Last parts of the names of linear layers, the head's left out."""
    head = lm.get_output_embeddings()
    linear = (name for name, module in lm.named_modules() if isinstance(module, torch.nn.Linear) and module is not head)
    return sorted({name.rpartition(".")[2] for name in linear})
