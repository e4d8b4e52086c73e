"""Fuzzing of the decoders: whatever the bytes, the outcome is a typed value or a WireError, soon.

`mutate`, `junk_frames` and `check_decoders` are plain functions of a random generator, so that a long run can use them.
"""

import random
from collections.abc import Callable

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.version import Version
from common.weights.client import VersionGone, _read_manifest
from common.weights.snapshot import Manifest
from common.wire.codec import Envelope, WireError, decode, encode
from common.wire.groups import GroupLimits, group_frames, group_header, read_group
from common.wire.messages import (
    PROTOCOL,
    ActorState,
    Announcement,
    Chunk,
    ChunkRequest,
    Goodbye,
    GroupHeader,
    Hello,
    LeaseFailure,
    ManifestReply,
    ManifestRequest,
    Message,
    Role,
    WorkRequest,
)
from tests.test_inbox import make_group

MAX_BYTES = 1 << 20
LIMITS = GroupLimits(vocab_size=100, group_size=2, max_version=3)
VERSION = Version(run_id="run", incarnation=1, step=3, hash="ab" * 16)
AWKWARD = (
    b"\x00",
    b"\xff",
    b"\xc1",
    b"\x91",
    b"\x81",
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xcb\x7f\xf8",
)

fuzz = settings(deadline=None, derandomize=True, max_examples=300)


def good_messages() -> list[list[bytes]]:
    """One of each kind that a peer sends, encoded."""
    group = make_group("1.abc")
    plain: list[Message] = [
        Hello(peer_id="a", session="s", role=Role.ACTOR, engine="e", config_hash="c"),
        WorkRequest(state=ActorState.SERVING, capacity=3, serving=VERSION, held=("1.a", "2.b")),
        LeaseFailure(lease_id="1.a", reason="no"), Goodbye(), ManifestRequest(version=VERSION),
        ChunkRequest(version=VERSION, index=1), Announcement(version=VERSION),
    ]  # fmt: skip
    framed = [
        encode(group_header(group), group_frames(group)),
        encode(ManifestReply(version=VERSION, num_bytes=5, chunk_bytes=2), [bytes(48)]),
        encode(Chunk(version=VERSION, index=0), [bytes(100)]),
    ]
    return [[bytes(frame) for frame in frames] for frames in [*map(encode, plain), *framed]]


GOOD = good_messages()


def mutate(frames: list[bytes], chance: random.Random) -> list[bytes]:
    """A message that was damaged somewhere: bits, lengths, awkward bytes, frames lost, swapped or doubled."""
    frames = [bytes(frame) for frame in frames]
    for _ in range(chance.randint(1, 4)):
        where = chance.randrange(len(frames)) if frames else 0
        match chance.randrange(7) if frames else 6:
            case 0 if frames[where]:
                at = chance.randrange(len(frames[where]))
                flipped = frames[where][at] ^ (1 << chance.randrange(8))
                frames[where] = frames[where][:at] + bytes([flipped]) + frames[where][at + 1 :]
            case 1:
                frames[where] = frames[where][: chance.randint(0, len(frames[where]))]
            case 2:
                at = chance.randint(0, len(frames[where]))
                frames[where] = frames[where][:at] + chance.choice(AWKWARD) + frames[where][at:]
            case 3:
                del frames[where]
            case 4:
                frames.insert(where, frames[where])
            case 5:
                frames[where] = chance.randbytes(chance.randint(0, 200))
            case _:
                frames.append(chance.randbytes(chance.randint(0, 20)))
    return frames


def junk_frames(chance: random.Random) -> list[bytes]:
    """Bytes that never were a message, or a map of arbitrary values under the right protocol."""
    if chance.random() < 0.5:
        return [chance.randbytes(chance.randint(0, 300)) for _ in range(chance.randint(0, 8))]
    keys = ("kind", "version", "held", "reason", "trajectories", "lease_id", "x")
    header = {chance.choice(keys): junk_value(chance, 8) for _ in range(chance.randint(0, 8))}
    kind = chance.choice(("hello", "work_request", "group", "goodbye", "chunk", "nothing"))
    return [msgpack.packb({"protocol": PROTOCOL, "kind": kind} | header)]


def junk_value(chance: random.Random, depth: int) -> object:
    match chance.randrange(9 if depth else 6):
        case 0:
            return None
        case 1:
            return chance.randint(-(2**63), 2**64 - 1)
        case 2:
            return chance.choice((float("nan"), float("inf"), -0.0, 1e308))
        case 3:
            return chance.randbytes(chance.randint(0, 9))
        case 4:
            return "x" * chance.randint(0, 100)
        case 5:
            return chance.choice((True, "hello", "actor", "serving", PROTOCOL))
        case 6:
            return {str(i): junk_value(chance, depth - 1) for i in range(chance.randint(0, 3))}
        case _:
            return [junk_value(chance, depth - 1) for _ in range(chance.randint(0, 3))]


def check_decoders(frames: list[bytes]) -> str:
    """What became of a message: the kind that it was read as, or "refused". Anything but that raises."""
    try:
        envelope = decode(frames, max_bytes=MAX_BYTES)
        assert isinstance(envelope, Envelope)
        assert isinstance(envelope.message, Message)
        match envelope.message:
            case GroupHeader() as header:
                group = read_group(header, envelope.frames, LIMITS)
                assert all(np.isfinite(trajectory.logprobs).all() for trajectory in group.trajectories)
            case ManifestReply() as reply:
                assert isinstance(_read_manifest(reply, envelope.frames), Manifest)
            case _:
                pass
    except WireError as error:
        line = str(error)
    except VersionGone:
        return "gone"
    else:
        return envelope.message.kind
    assert "\n" not in line
    assert len(line) < 500
    return "refused"


@fuzz
@given(st.integers(0, len(GOOD) - 1), st.randoms(use_true_random=False))
def test_a_damaged_message_is_read_or_refused(which: int, chance: random.Random) -> None:
    check_decoders(mutate(GOOD[which], chance))


@fuzz
@given(st.randoms(use_true_random=False))
def test_junk_is_read_or_refused(chance: random.Random) -> None:
    check_decoders(junk_frames(chance))


nested = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=30,
)


@fuzz
@given(st.sampled_from(["peer_id", "session", "role", "engine", "config_hash", "extra", "run_id"]), nested)
def test_a_hello_with_anything_in_it_is_read_or_refused(field: str, value: object) -> None:
    (header,) = GOOD[0]
    outcome = check_decoders([msgpack.packb(msgpack.unpackb(header) | {field: value})])
    assert outcome in ("hello", "refused")


@fuzz
@given(st.integers(0, 2**53), st.integers(1, 1 << 26), st.binary(max_size=400))
def test_a_manifest_of_any_size_is_read_or_gone(num_bytes: int, chunk_bytes: int, hashes: bytes) -> None:
    reply = ManifestReply(version=VERSION, num_bytes=num_bytes, chunk_bytes=chunk_bytes)
    assert check_decoders([*encode(reply), hashes]) in ("manifest", "gone")


@fuzz
@given(st.lists(st.binary(max_size=80), min_size=4, max_size=4), st.integers(1, 9), st.integers(2, 9))
def test_a_group_of_any_bytes_is_read_or_refused(frames: list[bytes], num_prompt_tokens: int, num_tokens: int) -> None:
    row = {"num_tokens": num_tokens, "reward": 0.0, "is_truncated": False}
    header = {"protocol": PROTOCOL, "kind": "group", "lease_id": "1.a", "trajectories": [row, row]}
    padded = [frame.ljust(8 * num_tokens, b"\0")[: 8 * num_tokens] for frame in frames]
    check_decoders([msgpack.packb(header | {"num_prompt_tokens": num_prompt_tokens}), *padded])
    check_decoders([msgpack.packb(header | {"num_prompt_tokens": num_prompt_tokens}), *frames])


@pytest.mark.parametrize("make", [lambda chance: mutate(chance.choice(GOOD), chance), junk_frames])
def test_thousands_of_messages_in_a_row_are_read_or_refused(make: Callable[[random.Random], list[bytes]]) -> None:
    chance = random.Random(7)
    outcomes = {check_decoders(make(chance)) for _ in range(3000)}
    assert "refused" in outcomes
