"""A tiny random Llama with a byte-level tokenizer, as a Hugging Face folder: a policy that tests can afford.

`replay` is the slow reference that every engine with a model is held against.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from common.weights.policy import pack_adapters, shapes_of_base, tensors_of_policy
from common.weights.snapshot import Snapshot, write_snapshot

torch.set_num_threads(1)  # tensors this small gain nothing from a second thread, and lose much where cores are shared

START, END = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Write model and tokenizer into `folder`; equal seeds give equal weights."""
    tokenizer = _tokenizer()
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.25,  # weights large enough that answers differ from one another
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reconfigure(base: Path, folder: Path, **keys: Any) -> Path:
    """The model in `base` once more, with other `keys` in its config.json; a Mistral is a Llama with a window."""
    shutil.copytree(base, folder)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))
    return folder


def snapshot_of(folder: Path, path: Path, *, step: int) -> Snapshot:
    """The weights of the model in `folder` as the learner would publish them: bfloat16, a tied head left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    return write_snapshot(tensors, path, run_id="test", incarnation=1, step=step, chunk_bytes=1 << 20)


def adapt(base: Path, folder: Path, *, step: int) -> tuple[Snapshot, Path]:
    """A version of random adapters to the model in `base`, and a folder, in float32, of what they make of it."""
    numbers = torch.Generator().manual_seed(step)
    adapters = {
        name.replace(".weight", f".lora_{kind}.weight"): 0.2 * torch.randn(size, generator=numbers)
        for name, shape in shapes_of_base(base).items()
        if "_proj" in name
        for kind, size in (("A", (3, shape[1])), ("B", (shape[0], 3)))
    }
    tensors, path = pack_adapters(adapters, base=base, scale=0.5), folder / f"{step}.safetensors"
    snapshot = write_snapshot(tensors, path, run_id="test", incarnation=1, step=step, chunk_bytes=1 << 20)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.load_state_dict(dict(tensors_of_policy(path, base)), strict=False)
    model.save_pretrained(folder / "merged")
    return snapshot, folder / "merged"


@torch.no_grad()
def replay(
    folders: Mapping[int, Path], prompt: Sequence[int], tokens: Sequence[int], versions: Sequence[int]
) -> Tensor:
    """Logits [T, V] that each answer token was drawn from, one token at a time in float32.

    Every step runs with the weights of its token's version, on the keys and values that earlier steps left behind.
    """
    models = {step: AutoModelForCausalLM.from_pretrained(folders[step], dtype=torch.float32) for step in set(versions)}
    cache, fed, logits = DynamicCache(), list(prompt), []
    for token, version in zip(tokens, versions, strict=True):
        logits.append(models[version](input_ids=torch.tensor([fed]), past_key_values=cache).logits[0, -1])
        fed = [token]
    return torch.stack(logits)


def _tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(START, special=True), AddedToken(END, special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
