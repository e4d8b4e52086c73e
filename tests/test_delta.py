"""Deltas of chunks: exact for any bytes, short for what training does to weights, harmless where they are broken."""

import random
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from common.weights.delta import COUNT, Coding, DeltaError, encode, patch
from tests.chaos.payloads import mutate

NUM_WORDS = 1 << 18
exact = settings(deadline=None, derandomize=True, max_examples=300)


def patched(base: bytes, delta: bytes) -> bytes:
    chunk = bytearray(base)
    patch(memoryview(chunk), delta)
    return bytes(chunk)


def weights(seed: int = 0) -> NDArray[np.uint16]:
    """Normally distributed numbers in bfloat16, as bits."""
    values = np.random.default_rng(seed).normal(scale=0.05, size=NUM_WORDS).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype("<u2")


def stepped(words: NDArray[np.uint16], frac: float, *, seed: int = 1) -> NDArray[np.uint16]:
    """A share of the words up or down by a unit in the last place."""
    numbers = np.random.default_rng(seed)
    steps = np.where(numbers.random(len(words)) < frac, numbers.choice([-1, 1], len(words)), 0)
    return (words.astype(np.int32) + steps).astype("<u2")


@exact
@given(st.binary(max_size=300), st.randoms(use_true_random=False), st.floats(0, 1))
def test_a_patched_base_is_the_new_chunk_whatever_the_bytes_are(
    base: bytes, chance: random.Random, rate: float
) -> None:
    new = bytes(chance.randrange(256) if chance.random() < rate else byte for byte in base)
    delta = encode(base, new)
    assert patched(base, delta) == new
    assert len(delta) <= len(new) + 1


@pytest.mark.parametrize(
    ("frac", "coding", "most"),
    [
        (0.0, Coding.UNCHANGED, 0.0),
        (0.004, Coding.SPARSE, 0.0035),
        (0.02, Coding.SPARSE, 0.012),
        (0.6, Coding.XOR, 0.2),
    ],
)
def test_weights_that_moved_by_units_in_the_last_place_take_little(frac: float, coding: Coding, most: float) -> None:
    base = weights().tobytes()
    new = stepped(weights(), frac).tobytes()
    delta = encode(base, new)
    assert delta[0] == coding
    assert len(delta) <= max(most * len(base), 1)
    assert patched(base, delta) == new


def test_other_weights_come_as_they_are() -> None:
    numbers = np.random.default_rng(3)
    base, new = numbers.bytes(1000), numbers.bytes(1000)
    assert encode(base, new) == bytes([Coding.RAW]) + new


def test_a_chunk_of_odd_length_and_one_without_bytes_are_chunks_too() -> None:
    base = weights().tobytes()[:9999]
    new = base[:5000] + b"!" + base[5001:]
    delta = encode(base, new)
    assert delta[0] == Coding.SPARSE
    assert patched(base, delta) == new
    assert patched(b"", encode(b"", b"")) == b""


@exact
@given(st.sampled_from([0.004, 0.6]), st.randoms(use_true_random=False))
def test_a_damaged_delta_gives_a_chunk_of_the_same_length_or_a_delta_error(frac: float, chance: random.Random) -> None:
    base = weights()[:2000]
    damaged = b"".join(mutate([encode(base.tobytes(), stepped(base, frac).tobytes())], chance))
    try:
        assert len(patched(base.tobytes(), damaged)) == len(base.tobytes())
    except DeltaError as error:
        assert str(error).startswith("delta: got ")  # noqa: PT017 -- most of the damage is noticed, not all of it


def plane(data: bytes) -> bytes:
    frame = zstandard.ZstdCompressor().compress(data)
    return COUNT.pack(len(frame)) + frame


def sparse(count: int, gaps: bytes, steps: bytes) -> bytes:
    """Of one-byte numbers."""
    zeros = plane(bytes(len(gaps)))
    return (
        bytes([Coding.SPARSE]) + COUNT.pack(count) + plane(gaps) + 3 * zeros + plane(steps) + plane(bytes(len(steps)))
    )


@pytest.mark.parametrize(
    ("delta", "why"),
    [
        (b"", r"got coding None with 0 bytes"),
        (b"\x09", r"got coding 9"),
        (bytes([Coding.RAW]) + bytes(99), r"got coding 3 with 99 bytes"),
        (bytes([Coding.UNCHANGED, 0]), r"got 1 bytes after its end"),
        (bytes([Coding.SPARSE, 1]), r"got 1 bytes, expected a count"),
        (sparse(51, bytes(51), bytes(51)), r"got 51 changed words, expected 1 to 50"),
        (sparse(0, b"", b""), r"got 0 changed words, expected 1 to 50"),
        (sparse(2, bytes([40, 9]), bytes(2)), r"got a change of word 50, expected less than 50"),
        (sparse(2, bytes(3), bytes(2)), r"got a plane of 3 bytes, expected 2"),
        (sparse(2, bytes(2), bytes(2)) + b"!", r"got 1 bytes after its end"),
        (bytes([Coding.XOR]) + COUNT.pack(4) + b"junk", r"got a plane that cannot be read"),
        (bytes([Coding.XOR]) + COUNT.pack(1 << 30), r"got a plane that cannot be read"),
        (bytes([Coding.XOR]), r"got a plane that cannot be read"),
    ],
)
def test_what_is_no_delta_of_the_chunk_is_refused_in_one_line(delta: bytes, why: str) -> None:
    with pytest.raises(DeltaError, match=why) as refused:
        patched(bytes(100), delta)
    assert "\n" not in str(refused.value)


def test_a_delta_that_would_unpack_into_a_gibibyte_takes_no_more_than_its_chunk() -> None:
    bomb = bytes([Coding.XOR]) + 2 * plane(bytes(1 << 28))
    assert len(bomb) < 1 << 16
    tracemalloc.start()
    try:
        with pytest.raises(DeltaError, match=r"got a plane of 268435456 bytes, expected 50"):
            patched(bytes(100), bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
