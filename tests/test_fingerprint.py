"""The fingerprint of tensors: equal for equal ones wherever they lie, another one for whatever could go wrong."""

import numpy as np
import pytest
import torch
from torch import Tensor

from common.weights.fingerprint import BLOCK_WORDS, WORD_BYTES, _weights, fingerprint_of

MODULUS = 1 << 64


def tensor_of(num_bytes: int, *, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8))


def slow_number(data: bytes) -> int:
    """As the docstring says it, word by word, in Python's integers."""
    inner = [int(w) for w in _weights(0, BLOCK_WORDS, "cpu").numpy().view(np.uint64)]
    outer = [int(v) for v in _weights(1, 1 << 18, "cpu").numpy().view(np.uint64)]
    num_words, total = len(data) // WORD_BYTES, 0
    for place in range(num_words):
        word = int.from_bytes(data[place * WORD_BYTES : (place + 1) * WORD_BYTES], "little")
        total += outer[place // BLOCK_WORDS] * inner[place % BLOCK_WORDS] * word
    total += sum(outer[place - WORD_BYTES] * byte for place, byte in enumerate(data[num_words * WORD_BYTES :]))
    return total % MODULUS


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 1000, BLOCK_WORDS * WORD_BYTES, BLOCK_WORDS * WORD_BYTES * 2 + 21])
def test_it_is_the_sum_that_it_says_it_is(num_bytes: int) -> None:
    from common.weights.fingerprint import _number_of

    data = tensor_of(num_bytes)
    assert int(_number_of(data)) % MODULUS == slow_number(data.numpy().tobytes())


def test_every_bit_every_order_and_every_outline_counts() -> None:
    data = tensor_of(BLOCK_WORDS * WORD_BYTES * 3 + 6)
    plain = fingerprint_of([("a", data)])
    assert fingerprint_of([("a", data.clone())]) == plain
    others = [("b", data), ("a", data.view(2, -1)), ("a", data[:-6].view(torch.bfloat16))]
    for place in (0, 11, BLOCK_WORDS * WORD_BYTES + 5, len(data) - 1):
        flipped = data.clone()
        flipped[place] ^= 0x80
        others.append(("a", flipped))
    words = data[:-6].view(torch.int64)
    for left, right in ((0, 1), (1, BLOCK_WORDS), (1, 2 * BLOCK_WORDS)):
        swapped = words.clone()
        swapped[[left, right]] = swapped[[right, left]]
        others.append(("a", torch.cat([swapped.view(torch.uint8), data[-6:]])))
    found = [fingerprint_of([one]) for one in others]
    assert plain not in found
    assert len(set(found)) == len(found)
    two = [("a", data[:100].clone()), ("b", data[100:].clone())]
    assert fingerprint_of(two) != fingerprint_of(two[::-1])


def test_tensors_in_a_buffer_that_they_share_have_the_fingerprint_of_their_own() -> None:
    buffer = tensor_of(4000)
    for begin in range(0, 24, 2):
        part = buffer[begin : begin + 3002].view(torch.bfloat16)
        assert fingerprint_of([("a", part)]) == fingerprint_of([("a", part.clone())])
