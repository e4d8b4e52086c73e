"""The policy as the objective sees it: log-probs and entropies of loss-bearing tokens, and of nothing else."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import OperatorError
from common.model_folder import require_model_folder
from learner import packed_attention
from learner.adapters import Lora, add_adapters, trained_parameters
from learner.batch import TrainBatch, build_batch
from learner.head import Head
from learner.rows import Branch, Row

CHECK_TOLERANCE = 1e-3
"""Largest difference of a log-prob between this path and the model's own logits, float32."""


class PolicyModel(nn.Module):
    """A causal language model whose forward pass takes a TrainBatch."""

    def __init__(self, lm: nn.Module, *, head_chunk_tokens: int) -> None:
        super().__init__()
        self.lm: Any = lm
        self.head = Head(self.lm.get_output_embeddings(), chunk_tokens=head_chunk_tokens)
        self.compute_dtype = torch.float32
        """bfloat16 runs the decoder's matrix products in it (autocast); the head stays in the parameters' precision."""

    def forward(self, batch: TrainBatch) -> tuple[Tensor, Tensor]:
        """([B, T] log-probs with gradient, [B, T] entropies without), float32; 0 where the mask is 0."""
        wanted = batch.mask.flatten().nonzero().squeeze(1)
        if wanted.numel() == 0:
            wanted = torch.zeros(1, dtype=torch.int64, device=batch.tokens.device)  # every rank runs head and backward
        scores = self.head(
            self._decode(batch)[batch.sources.flatten()[wanted]],
            batch.targets.flatten()[wanted],
            batch.temperatures[:, None].expand_as(batch.mask).flatten()[wanted],
        )
        empty = torch.zeros(batch.mask.numel(), dtype=torch.float32, device=batch.tokens.device)
        logprobs, entropies = (empty.index_put((wanted,), values).view(batch.mask.shape) for values in scores)
        return logprobs, entropies

    def _decode(self, batch: TrainBatch) -> Tensor:
        """[N, H] hidden states."""
        decoder = getattr(self.lm, self.lm.base_model_prefix)
        uses_autocast = self.compute_dtype == torch.bfloat16
        with torch.autocast(batch.tokens.device.type, dtype=torch.bfloat16, enabled=uses_autocast):
            hidden = decoder(
                input_ids=batch.tokens[None], position_ids=batch.positions[None], packed=batch, use_cache=False
            ).last_hidden_state
        return hidden[0].to(next(self.parameters()).dtype)


def resolve_compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` takes bfloat16 where the hardware has units for it: GPUs, and CPUs with AMX."""
    if name == "auto":
        has_units = device.type == "cuda" or torch.cpu.get_capabilities().get("amx_bf16", False)
        return torch.bfloat16 if has_units else torch.float32
    return getattr(torch, name)


def load_policy_model(
    path: Path,
    *,
    dtype: torch.dtype,
    head_chunk_tokens: int,
    recompute_activations: bool = False,
    weights: Path | None = None,
    lora: Lora | None = None,
) -> PolicyModel:
    """The policy of a Hugging Face folder, with the weights of a published version in place of the folder's, if given.

    With `lora`, adapters are trained in place of its weights, and they are what a published version holds.

    Raises OperatorError where the folder or the architecture will not do.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    require_model_folder(path)
    packed_attention.register()
    try:
        lm: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=packed_attention.NAME, local_files_only=True
        )
    except (OSError, ValueError) as error:
        raise OperatorError(f"model.path: {path}: {str(error).splitlines()[0]}") from error
    if lora:
        add_adapters(lm, lora, base=path)
    if weights:
        _take_over(lm, load_file(weights))
    if recompute_activations:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PolicyModel(lm, head_chunk_tokens=head_chunk_tokens).train()
    check_architecture(model)
    return model


@torch.no_grad()
def check_architecture(model: PolicyModel) -> None:
    """Compare shared prompts and the chunked head with the model's own logits, once, on a few tokens.

    An architecture that scales its logits or narrows its attention in a way that this path does not know is refused
    here, rather than trained wrongly.
    """
    prompt, answers = [3, 1, 4, 1, 5], ([9, 2, 6], [5, 3])
    branches = tuple(_plain_branch(answer) for answer in answers)
    row = Row(torch.tensor(prompt, dtype=torch.int32).numpy(), branches)
    ours, _ = model(build_batch([row]))
    for b, answer in enumerate(answers):
        logits = model.lm(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].float()
        expected = logits.log_softmax(-1)[range(len(prompt) - 1, len(prompt) + len(answer) - 1), answer]
        difference = (ours[b, : len(answer)] - expected).abs().max().item()
        limit = CHECK_TOLERANCE if logits.dtype == next(model.parameters()).dtype else 0.1
        if difference > limit:
            raise OperatorError(
                f"model.path: with shared prompts {type(model.lm).__name__} differs by {difference:.2g} from its own "
                "log-probs, expected a decoder with plain causal attention and a linear head"
            )


@torch.no_grad()
def _take_over(lm: Any, tensors: dict[str, Tensor]) -> None:
    for name, parameter in trained_parameters(lm):
        parameter.copy_(tensors[name])


def _plain_branch(tokens: list[int]) -> Branch:
    ones = torch.ones(len(tokens)).numpy()
    return Branch(torch.tensor(tokens, dtype=torch.int32).numpy(), ones, -ones, 1.0, 1.0, is_expert=False)
