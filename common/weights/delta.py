"""A chunk of weights as what differs from the same chunk of another version; exact, whatever the bytes are.

From step to step few 16-bit words of bfloat16 weights change, and most of those by one unit in the last place: where
they are, and by how much, take a fraction of a per cent. Each chunk has the shortest of four codings:

- unchanged: nothing;
- sparse: how many words lie between the changed ones, and what to add to each of those;
- xor: of all words with those of the base;
- raw: the chunk itself.

Numbers are split into planes, all first bytes, all second bytes and so on, each compressed for itself: the planes
differ too much to share statistics.
"""

import struct
from enum import IntEnum
from typing import Any, cast

import numpy as np
import zstandard
from numpy.typing import NDArray

from common.wire.codec import Buffer

Words = NDArray[np.integer[Any]]
"""Unsigned: what exceeds the width of a word is dropped."""

COUNT = struct.Struct("<I")
GAP = np.dtype("<u4")
MAX_SPARSE_FRAC = 0.25
"""Of changed words, above which the sparse coding is not tried: each of its words takes more than one of an xor."""
MIN_XOR_FRAC = 0.05
"""Below it the xor is not tried: most of it is zeros, whose places the sparse coding tells in fewer bits. Where the two
meet, the shorter one is taken."""
LEVEL = 1
"""The highest ones save a tenth more, and take thirty times as long: what is left is noise."""


class DeltaError(ValueError):
    """The bytes are no delta of such a chunk."""


class Coding(IntEnum):
    """The first byte of a delta."""

    UNCHANGED = 0
    SPARSE = 1
    XOR = 2
    RAW = 3


def encode(base: Buffer, new: Buffer) -> bytes:
    """What turns `base` into `new`, which are equally long."""
    old, now = _words(base), _words(new)
    changed = np.flatnonzero(old != now)
    if not len(changed):
        return bytes([Coding.UNCHANGED])
    deltas, frac = list[bytes](), len(changed) / len(now)
    if frac <= MAX_SPARSE_FRAC:
        gaps = (np.diff(changed, prepend=-1) - 1).astype(GAP)
        steps = _fold(now[changed] - old[changed])
        deltas.append(bytes([Coding.SPARSE]) + COUNT.pack(len(changed)) + _compress(gaps) + _compress(steps))
    if frac >= MIN_XOR_FRAC:
        deltas.append(bytes([Coding.XOR]) + _compress(old ^ now))
    shortest = min(deltas, key=len)
    return shortest if len(shortest) <= len(new) else b"".join([bytes([Coding.RAW]), new])


def patch(chunk: memoryview, delta: Buffer) -> None:
    """Turn `chunk` from the base's into the new one, in place. Raises DeltaError; then it is neither.

    Takes memory in proportion to the chunk, whatever the delta says of itself.
    """
    words, data = _words(chunk), memoryview(delta)
    coding, data = (data[0] if len(data) else None), data[1:]
    if coding == Coding.SPARSE:
        data = _patch_sparse(words, data)
    elif coding == Coding.XOR:
        differences, data = _decompress(data, words.dtype, len(words))
        words ^= differences
    elif coding == Coding.RAW and len(data) == len(chunk):
        chunk[:], data = data, data[len(data) :]
    elif coding != Coding.UNCHANGED:
        raise DeltaError(f"delta: got coding {coding} with {len(data)} bytes, expected one of {[*Coding]}")
    if len(data):
        raise DeltaError(f"delta: got {len(data)} bytes after its end, expected none")


def _patch_sparse(words: Words, data: memoryview) -> memoryview:
    """Returns what comes after it."""
    if len(data) < COUNT.size:
        raise DeltaError(f"delta: got {len(data)} bytes, expected a count")
    (count,) = cast("tuple[int]", COUNT.unpack_from(data))
    if not 0 < count <= len(words):
        raise DeltaError(f"delta: got {count} changed words, expected 1 to {len(words)}")
    gaps, data = _decompress(data[COUNT.size :], GAP, count)
    steps, data = _decompress(data, words.dtype, count)
    places = np.cumsum(gaps.astype(np.int64) + 1) - 1
    if places[-1] >= len(words):
        raise DeltaError(f"delta: got a change of word {places[-1]}, expected less than {len(words)}")
    words[places] += _unfold(steps)
    return data


def _words(data: Buffer) -> Words:
    """16-bit ones, but for a chunk of odd length."""
    return np.frombuffer(data, dtype="<u2" if len(data) % 2 == 0 else "u1")


def _fold(differences: Words) -> Words:
    """Small differences of either sign as small numbers: 0, −1, 1, −2, 2 become 0, 1, 2, 3, 4."""
    return (differences << 1) ^ -(differences >> (8 * differences.itemsize - 1))


def _unfold(folded: Words) -> Words:
    return (folded >> 1) ^ -(folded & 1)


def _compress(numbers: Words) -> bytes:
    """Plane by plane, each with its length before it."""
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    planes = numbers.view(np.uint8).reshape(-1, numbers.itemsize).T
    frames = [compressor.compress(plane.tobytes()) for plane in planes]
    return b"".join(COUNT.pack(len(frame)) + frame for frame in frames)


def _decompress(data: memoryview, dtype: np.dtype[Any], count: int) -> tuple[Words, memoryview]:
    """`count` numbers, and what comes after them."""
    decompressor = zstandard.ZstdDecompressor()
    planes = np.empty((count, dtype.itemsize), dtype=np.uint8)
    for place in range(dtype.itemsize):
        (length,) = cast("tuple[int]", COUNT.unpack_from(data)) if len(data) >= COUNT.size else (0,)
        frame, data = data[COUNT.size : COUNT.size + length], data[COUNT.size + length :]
        try:
            # Checked first: the decompressor takes as much memory as the frame says.
            if (size := zstandard.frame_content_size(frame)) != count:
                raise DeltaError(f"delta: got a plane of {size} bytes, expected {count}")
            planes[:, place] = np.frombuffer(decompressor.decompress(frame), dtype=np.uint8)
        except zstandard.ZstdError as error:
            raise DeltaError(f"delta: got a plane that cannot be read ({error}), expected a zstd frame") from None
    return planes.reshape(-1).view(dtype), data
