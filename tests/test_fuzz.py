"""Fuzzing of the decoders: whatever the bytes, the outcome is a typed value or a WireError, soon."""

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
from common.wire.groups import GroupLimits, read_group
from common.wire.messages import (
    PROTOCOL,
    GroupHeader,
    ManifestReply,
    Message,
)
from tests.chaos.payloads import Payloads, good_messages, junk_frames, mutate

MAX_BYTES = 1 << 20
LIMITS = GroupLimits(vocab_size=100, group_size=2, max_version=3)
VERSION = Version(run_id="run", incarnation=1, step=3, hash="ab" * 16)
fuzz = settings(deadline=None, derandomize=True, max_examples=300)


GOOD = good_messages(VERSION, "1.abc")
SIEGE = Payloads(random.Random(1), pool=200)
"""What `make soak` sends."""


def check_decoders(frames: list[bytes]) -> str:
    """What became of a message: the kind that it was read as, or "refused". Anything but that raises."""
    try:
        envelope = decode(frames, max_bytes=MAX_BYTES)
        assert isinstance(envelope, Envelope)
        assert isinstance(envelope.message, Message)
        match envelope.message:
            case GroupHeader() as header:
                group = read_group(header, envelope.frames, LIMITS).group()
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


@pytest.mark.parametrize(
    "make",
    [lambda chance: mutate(chance.choice(GOOD), chance), junk_frames, lambda _: SIEGE.draw()],
)
def test_thousands_of_messages_in_a_row_are_read_or_refused(make: Callable[[random.Random], list[bytes]]) -> None:
    chance = random.Random(7)
    outcomes = {check_decoders(make(chance)) for _ in range(3000)}
    assert "refused" in outcomes
