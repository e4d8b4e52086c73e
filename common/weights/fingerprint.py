"""A fingerprint of tensors that any device can take of its own memory, in one pass and at its memory's speed.

A version is named by a hash of a file's bytes, which a GPU cannot compute of tensors that never were in a file. So the
learner takes the fingerprint of the very file that it hashed, and whoever got the tensors by another way compares it.
It finds what gets lost or mixed up on the way. It is no cryptographic hash: those who send are trusted.

Each tensor's bytes are 64-bit words x; the words of block j are summed with odd weights w, and the sums with odd
weights v: Σ_j v_j Σ_i w_i x_ji modulo 2^64. Names, types and shapes are hashed with these numbers.
"""

import json
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

WORD_BYTES = 8
BLOCK_WORDS = 1 << 16
SLAB_BLOCKS = {"cpu": 8}
"""Blocks multiplied at a time: on a processor as many as its cache holds, elsewhere MANY_BLOCKS."""
MANY_BLOCKS = 128
MAX_BLOCKS = 1 << 18
"""Of one tensor: 128 GiB."""
HASH_BYTES = 16


class Fingerprint:
    """Takes tensors one by one; nothing is waited for before the end."""

    def __init__(self) -> None:
        self._outlines: list[tuple[str, str, list[int]]] = []
        self._numbers: list[Tensor] = []

    def add(self, name: str, tensor: Tensor) -> None:
        self._outlines.append((name, str(tensor.dtype), list(tensor.shape)))
        self._numbers.append(_number_of(tensor))

    def hexdigest(self) -> str:
        numbers = [int(number) for number in self._numbers]
        text = json.dumps(list(zip(self._outlines, numbers, strict=True)))
        return blake3(text.encode()).digest(length=HASH_BYTES).hex()


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    taken = Fingerprint()
    for name, tensor in tensors:
        taken.add(name, tensor)
    return taken.hexdigest()


def _number_of(tensor: Tensor) -> Tensor:
    """[] int64, on the tensor's device."""
    if not tensor.numel():
        return torch.zeros((), dtype=torch.int64)
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    num_words = len(data) // WORD_BYTES
    words, rest = data[: num_words * WORD_BYTES], data[num_words * WORD_BYTES :]
    if words.storage_offset() % WORD_BYTES:  # in a buffer that it shares with others
        words = words.clone()
    words = words.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    num_blocks = num_words // BLOCK_WORDS
    assert num_blocks < MAX_BLOCKS
    device = str(data.device)
    outer, inner = _weights(1, MAX_BLOCKS, device), _weights(0, BLOCK_WORDS, device)
    slab = SLAB_BLOCKS.get(data.device.type, MANY_BLOCKS)
    whole = words[: num_blocks * BLOCK_WORDS].view(num_blocks, BLOCK_WORDS)
    for begin in range(0, num_blocks, slab):
        sums = (whole[begin : begin + slab] * inner).sum(1)
        total = total + (sums * outer[begin : begin + len(sums)]).sum()
    last = words[num_blocks * BLOCK_WORDS :]
    ends = (last * inner[: len(last)]).sum() * outer[num_blocks]
    return total + ends + (rest.to(torch.int64) * outer[-WORD_BYTES : len(outer) - WORD_BYTES + len(rest)]).sum()


@cache
def _weights(stream: int, count: int, device: str) -> Tensor:
    """[count] odd numbers that look random: splitmix64 of the stream's own range."""
    numbers = np.arange(1, count + 1, dtype=np.uint64) + (np.uint64(stream) << np.uint64(32))
    mixed = numbers * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
    return torch.tensor(mixed.view(np.int64), device=device)
