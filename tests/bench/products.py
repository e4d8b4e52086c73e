"""The limit of a step on this machine: its matrix products alone, each as often as it must be taken.

Forward, the gradient of the input and the gradient of the weights: three products of every linear layer, over the
prompt's tokens once and every answer's, and of the head over the answers' tokens. Attention and all else cost nothing.
"""

import statistics
import time
from collections import Counter
from pathlib import Path

import torch
from transformers import AutoConfig

from tests.bench.group import Shape

REPETITIONS = 5


def seconds_of_products(model: Path, shape: Shape) -> float:
    config = AutoConfig.from_pretrained(model)
    hidden, inner = config.hidden_size, config.intermediate_size
    head_size = hidden // config.num_attention_heads
    layers = Counter(
        [(hidden, hidden)] * 2 + [(hidden, head_size * config.num_key_value_heads)] * 2 + [(hidden, inner)] * 3
    )
    body = sum(count * _seconds(shape.num_tokens, *sizes) for sizes, count in layers.items())
    head = _seconds(shape.answers * shape.answer, hidden, config.vocab_size)
    return config.num_hidden_layers * body + head


def _seconds(num_tokens: int, num_in: int, num_out: int) -> float:
    """Of the three products of a linear layer."""
    inputs, weight, slope = (
        torch.randn(num_tokens, num_in),
        torch.randn(num_out, num_in),
        torch.randn(num_tokens, num_out),
    )
    products = (lambda: inputs @ weight.T, lambda: slope @ weight, lambda: slope.T @ inputs)
    return sum(statistics.median(_timed(product) for _ in range(REPETITIONS)) for product in products)


def _timed(product: object) -> float:
    assert callable(product)
    started = time.perf_counter()
    product()
    return time.perf_counter() - started
