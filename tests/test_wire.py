"""The wire: messages and groups round-trip exactly; anything else is refused, whatever the bytes, at a bounded cost."""

import math
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from common.version import Version
from common.wire.codec import (
    MAX_FRAMES,
    MAX_HEADER_BYTES,
    Buffer,
    Envelope,
    ProtocolMismatch,
    WireError,
    decode,
    encode,
)
from common.wire.groups import GroupLimits, from_blob, group_frames, group_header, read_group, to_blob
from common.wire.messages import (
    MAX_LEASES,
    PROTOCOL,
    ActorState,
    Announcement,
    AnyMessage,
    Chunk,
    ChunkRequest,
    EvaluationResult,
    Goodbye,
    GroupHeader,
    Hello,
    Lease,
    LeaseFailure,
    ManifestReply,
    ManifestRequest,
    Message,
    Outcome,
    Receipt,
    Refusal,
    Role,
    TaskScore,
    TrajectoryHeader,
    TransferReply,
    TransferRequest,
    TransferStart,
    Welcome,
    Work,
    WorkRequest,
)

MAX_BYTES = 4 << 20
LIMITS = GroupLimits(vocab_size=320, group_size=3, max_version=7)
VERSION = Version(run_id="run", incarnation=1, step=3, hash="ab" * 16)

quick = settings(deadline=None, derandomize=True, max_examples=60)
names = st.text("abcXYZ019_.-", min_size=1, max_size=64)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)
numbers = st.integers(0, 2**53)
finite = st.floats(allow_nan=False, allow_infinity=False)
measures = st.floats(min_value=0, allow_infinity=False)
versions = st.builds(
    Version,
    run_id=st.text("ab-", max_size=64),
    incarnation=st.integers(0, 2**63),
    step=st.integers(0, 2**31 - 1),
    hash=st.text("0af", max_size=64),
)
leases = st.builds(
    Lease,
    lease_id=names,
    prompt_index=numbers,
    group_size=st.integers(2, 4096),
    temperature=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
    max_tokens=st.integers(1, 2**24),
    seed=numbers,
)
rows = st.builds(
    TrajectoryHeader, num_tokens=st.integers(2, 2**24), reward=st.floats(-1e6, 1e6), is_truncated=st.booleans()
)
shares = st.floats(0, 1)
scores = st.builds(
    TaskScore,
    task=st.text("ab0_.-/", min_size=1, max_size=80),
    num_problems=st.integers(1, 2**24),
    samples_per_problem=st.integers(1, 4096),
    num_correct=numbers,
    num_unparsed=numbers,
    num_truncated=numbers,
    confidence_95=st.tuples(shares, shares),
    pass_at_k=st.dictionaries(st.integers(1, 99999).map(str), shares, max_size=16),
    categories=st.dictionaries(st.text(min_size=1, max_size=64), shares, max_size=64),
    mean_score=finite,
    mean_answer_tokens=measures,
    wall_s=measures,
)
fields: dict[type[Message], dict[str, Any]] = {
    Hello: {"peer_id": names, "session": names, "role": st.sampled_from(Role), "engine": names, "config_hash": names},
    Welcome: {
        "weights_port": st.integers(1, 65535),
        "announcements_port": st.integers(1, 65535),
        "newest": st.none() | versions,
    },
    Refusal: {"reason": texts, "is_final": st.booleans()},
    WorkRequest: {
        "state": st.sampled_from(ActorState),
        "capacity": st.integers(0, MAX_LEASES),
        "serving": st.none() | versions,
        "held": st.lists(names, max_size=5).map(tuple),
        "sampled_tokens": numbers,
        "idle_s": measures,
    },
    Work: {
        "newest": st.none() | versions,
        "leases": st.lists(leases, max_size=4).map(tuple),
        "evaluation": st.none() | versions,
        "is_finished": st.booleans(),
    },
    GroupHeader: {
        "lease_id": names,
        "num_prompt_tokens": st.integers(1, 2**24),
        "trajectories": st.lists(rows, min_size=2, max_size=5).map(tuple),
    },
    LeaseFailure: {"lease_id": names, "reason": texts},
    EvaluationResult: {
        "version": versions,
        "scores": st.lists(scores, min_size=1, max_size=3).map(tuple),
    },
    Receipt: {"outcome": st.sampled_from(Outcome), "reason": texts},
    Goodbye: {"reason": texts},
    Announcement: {"version": versions},
    ManifestRequest: {"version": versions, "relay_port": st.integers(0, 65535)},
    ManifestReply: {"version": versions, "num_bytes": numbers, "chunk_bytes": st.integers(1, 1 << 26)},
    ChunkRequest: {"version": versions, "index": numbers},
    Chunk: {"version": versions, "index": numbers},
    TransferRequest: {"version": versions, "num_workers": st.integers(1, 4096), "is_member": st.booleans()},
    TransferReply: {"version": versions, "invitation": texts, "reason": texts},
    TransferStart: {"version": versions},
}
envelope_fields = {"run_id": st.text("ab-", max_size=64), "incarnation": numbers, "request_id": numbers}
messages = st.one_of([st.builds(kind, **envelope_fields, **own) for kind, own in fields.items()])


def packed(header: object, *frames: Buffer) -> list[Buffer]:
    return [msgpack.packb(header), *frames]


def hello(**changes: object) -> dict[str, object]:
    """A good Hello as a plain map, then changed; a value of None takes the key out."""
    good = {"protocol": PROTOCOL, "kind": "hello", "peer_id": "a", "session": "s", "role": "actor", "engine": "e"}
    return {key: value for key, value in (good | {"config_hash": "c"} | changes).items() if value is not None}


def refusal(frames: list[Buffer], *, max_bytes: int = MAX_BYTES) -> str:
    with pytest.raises(WireError) as refused:
        decode(frames, max_bytes=max_bytes)
    line = str(refused.value)
    assert "\n" not in line
    assert len(line) <= 400
    return line


def test_every_kind_of_message_is_tried() -> None:
    assert set(fields) == set(get_args(get_args(AnyMessage)[0]))


@settings(deadline=None, derandomize=True, max_examples=200)
@given(messages, st.lists(st.binary(max_size=64), max_size=MAX_FRAMES - 1))
def test_every_message_comes_back_as_it_went(message: AnyMessage, frames: list[bytes]) -> None:
    envelope = decode(encode(message, frames), max_bytes=MAX_BYTES)
    assert type(envelope.message) is type(message)
    assert envelope.message == message
    assert list(envelope.frames) == frames


def test_the_largest_messages_that_the_models_allow_are_taken() -> None:
    name = "n" * 64
    request = WorkRequest(state=ActorState.SERVING, capacity=1, serving=VERSION, held=(name,) * 2 * MAX_LEASES)
    rows = (TrajectoryHeader(num_tokens=2**24, reward=-1e5 / 3, is_truncated=True),) * 4096
    for message in (request, GroupHeader(lease_id=name, num_prompt_tokens=2**24, trajectories=rows)):
        assert decode(encode(message), max_bytes=MAX_BYTES).message == message
    lease = Lease(lease_id=name, prompt_index=2**53, group_size=4096, temperature=0.1, max_tokens=2**24, seed=2**53)
    work = Work(newest=VERSION, leases=(lease,) * MAX_LEASES)
    assert decode(encode(work), max_bytes=MAX_BYTES).message == work


@pytest.mark.parametrize("protocol", [PROTOCOL + 1, 0, "1", None, [1]])
def test_another_protocol_is_a_mismatch_that_names_both(protocol: object) -> None:
    with pytest.raises(ProtocolMismatch, match=rf"got .+, expected {PROTOCOL} \(update the older side\)"):
        decode(packed(hello(protocol=protocol, kind="not known yet")), max_bytes=MAX_BYTES)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (hello(kind="helo"), "helo"),
        (hello(kind=None), "kind: got NoneType, expected text"),
        (hello(kind=["hello"]), "kind: got tuple, expected text"),
        (hello(extra=1), "hello.extra: Extra inputs are not permitted"),
        (hello(session=None), "hello.session: Field required"),
        (hello(role="judge"), "hello.role: Input should be 'actor' or 'evaluator'"),
        (hello(peer_id="a b"), "hello.peer_id: String should match pattern"),
        (hello(peer_id=b"a"), "hello.peer_id: Input should be a valid string"),
        (hello(peer_id="a" * 65), "hello.peer_id: String should have at most 64 characters"),
        (hello(incarnation=-1), "hello.incarnation: Input should be greater than or equal to 0"),
        (hello(incarnation=True), "hello.incarnation: Input should be a valid integer"),
        (hello(incarnation=2**53 + 1), "hello.incarnation: Input should be less than or equal to"),
        (hello(engine=msgpack.ExtType(5, b"")), "hello.engine"),
        (hello(engine=msgpack.ExtType(5, b"x")), "not MessagePack within bounds"),
        (hello(engine=msgpack.Timestamp(1)), "not MessagePack within bounds"),
        (hello(extra="x" * 4097), "not MessagePack within bounds"),
        (hello(extra=[0] * 4097), "not MessagePack within bounds"),
        (hello(extra={str(i): i for i in range(65)}), "not MessagePack within bounds"),
        (hello() | {str(i): i for i in range(65)}, "not MessagePack within bounds"),
        (hello() | {7: 7}, "not MessagePack within bounds"),
        ([hello()], "got tuple, expected a map"),
        (None, "got NoneType, expected a map"),
    ],
)
def test_a_header_that_is_none_of_ours_is_refused_in_one_line(header: object, words: str) -> None:
    assert words in refusal(packed(header))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    group = {"protocol": PROTOCOL, "kind": "group", "lease_id": "1.a", "num_prompt_tokens": 1}
    row = {"num_tokens": 2, "reward": value, "is_truncated": False}
    assert "trajectories.0.reward" in refusal(packed(group | {"trajectories": [row, row]}))
    request = {"protocol": PROTOCOL, "kind": "work_request", "state": "serving", "capacity": 1, "serving": None}
    assert "idle_s" in refusal(packed(request | {"idle_s": value}))
    with pytest.raises(ValidationError):
        WorkRequest(state=ActorState.SERVING, capacity=1, serving=None, idle_s=value)


def test_sizes_and_numbers_of_frames_are_bounded() -> None:
    good = encode(Goodbye())
    assert "got 0 frames" in refusal([])
    assert f"got {MAX_FRAMES + 1} frames" in refusal([*good, *[b""] * MAX_FRAMES])
    assert "expected at most 100" in refusal([*good, b"x" * 100], max_bytes=100)
    assert f"header: got {MAX_HEADER_BYTES + 1} bytes" in refusal([b"\xc0" * (MAX_HEADER_BYTES + 1)])


@pytest.mark.parametrize("depth", [6, 100, 900, 1000, 1023, 1 << 19])
@pytest.mark.parametrize("opening", [b"\x91", b"\x81\xa1x"])
@pytest.mark.parametrize("key", ["protocol", "kind", "peer_id", "extra"])
def test_deep_nesting_is_refused_wherever_it_stands(key: str, opening: bytes, depth: int) -> None:
    header = hello(**{key: "here"})
    deep = opening * min(depth, (MAX_HEADER_BYTES - 200) // len(opening)) + b"\xc0"
    refusal([msgpack.packb(header).replace(b"\xa4here", deep)])


@pytest.mark.parametrize(
    "claim",
    [b"\xdf\xff\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"],
    ids=["map", "array", "text", "bytes"],
)
def test_a_few_bytes_that_claim_a_huge_container_cost_nothing(claim: bytes) -> None:
    assert peak_bytes(lambda: refusal([claim])) < 1 << 20
    assert peak_bytes(lambda: refusal([b"\x81\xa8protocol" + claim])) < 1 << 20


def test_the_costliest_header_that_fits_costs_a_bounded_amount() -> None:
    rows = b"".join(b"\xdc\x10\x00" + b"\x80" * 4096 for _ in range(63))  # 63 arrays of 4096 empty maps, 252 KiB
    bomb = b"\x82\xa8protocol" + bytes([PROTOCOL]) + b"\xa1x\xdc\x00\x3f" + rows
    assert len(bomb) < MAX_HEADER_BYTES
    assert peak_bytes(lambda: refusal([bomb])) < 100 * MAX_HEADER_BYTES


def peak_bytes(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.lists(st.binary(max_size=200), max_size=MAX_FRAMES + 1))
def test_random_bytes_give_an_envelope_or_a_wire_error(frames: list[bytes]) -> None:
    decode_or_refuse(frames)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(messages, st.data())
def test_damaged_messages_give_an_envelope_or_a_wire_error(message: AnyMessage, data: st.DataObject) -> None:
    header = bytearray(encode(message)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    decode_or_refuse([bytes(header[: data.draw(st.integers(0, len(header)))])])
    decode_or_refuse([bytes(header)])


@settings(deadline=None, derandomize=True, max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from(["protocol", "kind", "version", "newest", "leases", "held", "role", "reason"]) | st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=9)
            | st.sampled_from([PROTOCOL, "hello", "work", "group", "chunk"]),
            lambda values: st.lists(values, max_size=4) | st.dictionaries(texts, values, max_size=4),
        ),
    )
)  # fmt: skip
def test_any_map_gives_an_envelope_or_a_wire_error(header: dict[str, object]) -> None:
    decode_or_refuse(packed(header))
    decode_or_refuse(packed(header | {"protocol": PROTOCOL}))


def decode_or_refuse(frames: list[bytes] | list[Buffer]) -> None:
    try:
        envelope = decode(frames, max_bytes=MAX_BYTES)
    except WireError:
        return
    assert isinstance(envelope, Envelope)
    assert isinstance(envelope.message, Message)


def make_group(seed: int = 0, *, num_prompt_tokens: int = 4, answers: tuple[int, ...] = (3, 1, 5)) -> TrajectoryGroup:
    """A good group with arbitrary numbers in it; the last answer token but one, where there is one, was not sampled."""
    random = np.random.default_rng(seed)
    prompt = random.integers(0, LIMITS.vocab_size, num_prompt_tokens)

    def trajectory(num_answer_tokens: int) -> Trajectory:
        sampled = np.array([False] * num_prompt_tokens + [True] * num_answer_tokens)
        sampled[-2] &= num_answer_tokens < 3
        tokens = np.concatenate([prompt, random.integers(0, LIMITS.vocab_size, num_answer_tokens)])
        return Trajectory(
            tokens=tokens.astype(np.int32),
            logprobs=np.where(sampled, -random.exponential(size=len(tokens)), 0.0).astype(np.float32),
            mask=np.where(sampled, random.random(len(tokens)), 0.0).astype(np.float32),
            versions=np.where(sampled, random.integers(0, LIMITS.max_version + 1, len(tokens)), -1).astype(np.int32),
            reward=float(random.normal()),
            is_truncated=bool(random.integers(2)),
        )

    return TrajectoryGroup(f"{seed}.lease", num_prompt_tokens, tuple(trajectory(n) for n in answers))


def same_bits(left: TrajectoryGroup, right: TrajectoryGroup) -> bool:
    arrays = ("tokens", "logprobs", "mask", "versions")
    return (left.lease_id, left.num_prompt_tokens) == (right.lease_id, right.num_prompt_tokens) and all(
        (one.reward, one.is_truncated) == (other.reward, other.is_truncated)
        and all(getattr(one, name).tobytes() == getattr(other, name).tobytes() for name in arrays)
        for one, other in zip(left.trajectories, right.trajectories, strict=True)
    )


def sent(group: TrajectoryGroup) -> tuple[GroupHeader, list[Buffer]]:
    """Header and frames as the learner gets them."""
    envelope = decode(encode(group_header(group), group_frames(group)), max_bytes=MAX_BYTES)
    assert isinstance(envelope.message, GroupHeader)
    return envelope.message, list(envelope.frames)


def changed(group: TrajectoryGroup, index: int, name: str, position: int, value: float) -> TrajectoryGroup:
    """The group with one entry of one array replaced, in its trajectory `index`."""
    trajectories = list(group.trajectories)
    array = getattr(trajectories[index], name).copy()
    array[position] = value
    trajectories[index] = replace(trajectories[index], **{name: array})
    return replace(group, trajectories=tuple(trajectories))


@quick
@given(st.integers(0, 2**32), st.integers(1, 9), st.lists(st.integers(1, 9), min_size=3, max_size=3).map(tuple))
def test_a_group_comes_back_bit_by_bit(seed: int, num_prompt_tokens: int, answers: tuple[int, ...]) -> None:
    group = make_group(seed, num_prompt_tokens=num_prompt_tokens, answers=answers)
    header, frames = sent(group)
    arrays = read_group(header, frames, LIMITS)
    assert same_bits(arrays.group(), group)
    assert (arrays.min_version, arrays.num_sampled) == (group.min_version, group.num_answer_tokens)
    assert same_bits(from_blob(to_blob([*encode(header), *frames])), group)


def test_the_prompt_travels_once_little_endian_and_a_plain_mask_not_at_all() -> None:
    group = make_group()
    swapped = tuple(
        replace(t, tokens=t.tokens.astype(">i4"), logprobs=t.logprobs.astype(">f4"), mask=t.mask.astype(">f4"))
        for t in group.trajectories
    )
    tokens, logprobs, mask, _ = group_frames(replace(group, trajectories=swapped))
    prompt, answers = group.trajectories[0].tokens[:4], [t.tokens[4:] for t in group.trajectories]
    assert np.frombuffer(tokens, "<i4").tolist() == [int(x) for part in (prompt, *answers) for x in part]
    assert np.frombuffer(logprobs, "<f4").tolist() == [x for t in group.trajectories for x in t.logprobs[4:].tolist()]
    assert len(mask) == len(logprobs)
    plain = tuple(
        replace(t, mask=(t.versions != NOT_SAMPLED).astype(np.float32), versions=np.minimum(t.versions, 0))
        for t in group.trajectories
    )
    _, _, mask, versions = group_frames(replace(group, trajectories=plain))
    assert mask == b""
    # The last answer's last token but one was not sampled: before, it, and after.
    assert np.frombuffer(versions, "<i4").reshape(2, -1).tolist() == [
        [0, NOT_SAMPLED, 0, NOT_SAMPLED, 0],
        [1, 1, 5, 1, 1],
    ]
    assert same_bits(
        read_group(*sent(replace(group, trajectories=plain)), LIMITS).group(), replace(group, trajectories=plain)
    )


def test_the_answers_of_a_group_are_looked_at_where_they_lie() -> None:
    header, frames = sent(make_group())
    arrays = read_group(header, frames, LIMITS)
    for array, frame in zip((arrays.tokens, arrays.logprobs, arrays.mask, arrays.runs), frames, strict=True):
        assert array is not None
        assert np.shares_memory(array, np.frombuffer(frame, dtype=np.uint8))


def test_a_group_whose_trajectories_share_no_prompt_is_not_sent() -> None:
    group = make_group()
    with pytest.raises(ValueError, match="got different prompts"):
        group_frames(changed(group, 1, "tokens", 0, 319))
    with pytest.raises(ValueError, match="or an empty answer"):
        group_frames(replace(make_group(answers=(1, 1, 1)), num_prompt_tokens=5))
    for name in ("mask", "versions", "logprobs"):
        with pytest.raises(ValueError, match="sampled tokens in the prompt"):
            group_frames(changed(group, 1, name, 0, 1))


@pytest.mark.parametrize(
    ("name", "position", "value", "words"),
    [
        ("logprobs", 5, math.nan, "trajectory.logprobs: got a value that is no log-prob"),
        ("logprobs", 5, -math.inf, "trajectory.logprobs"),
        ("logprobs", 5, 0.01, "trajectory.logprobs"),
        ("tokens", 5, 320, "trajectory.tokens: got ids"),
        ("tokens", 5, -1, "expected 0 to 319"),
        ("mask", 4, -1.0, "trajectory.mask: got a negative"),
        ("mask", 4, math.nan, "trajectory.mask"),
        ("mask", 4, math.inf, "trajectory.mask"),
        ("mask", 5, 1.0, "got loss on tokens that no policy sampled"),
        ("versions", 4, 8, "to 8, expected -1 to 7"),
        ("versions", 4, -2, "trajectory.versions: got -2 to"),
    ],
)
def test_a_group_with_one_wrong_entry_is_refused(name: str, position: int, value: float, words: str) -> None:
    with pytest.raises(WireError, match=r"expected") as refused:
        read_group(*sent(changed(make_group(), 0, name, position, value)), LIMITS)
    assert words in str(refused.value)


def test_a_group_of_another_size_is_refused() -> None:
    for answers in ((3, 1), (3, 1, 5, 2)):
        with pytest.raises(WireError, match=rf"got {len(answers)} trajectories, expected 3"):
            read_group(*sent(make_group(answers=answers)), LIMITS)


def test_a_group_without_a_sampled_token_or_without_an_answer_is_refused() -> None:
    group = make_group(answers=(1, 1, 1))
    silent = changed(changed(group, 1, "versions", 4, NOT_SAMPLED), 1, "mask", 4, 0.0)
    with pytest.raises(WireError, match=r"got an answer without a sampled token, expected"):
        read_group(*sent(silent), LIMITS)
    header, frames = sent(group)
    with pytest.raises(WireError, match=r"got 5 tokens with a prompt of 5, expected an answer"):
        read_group(header.model_copy(update={"num_prompt_tokens": 5}), frames, LIMITS)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("change", [-4, -1, 1, 4])
def test_a_group_whose_frames_have_wrong_sizes_is_refused(index: int, change: int) -> None:
    header, frames = sent(make_group())
    frames[index] = bytes(len(frames[index]) + change)
    expected = ("52", "36", "0 or 36", "8 for each run")[index]
    with pytest.raises(WireError, match=rf"group\.\w+: got \d+ bytes, expected {expected}"):
        read_group(header, frames, LIMITS)


@pytest.mark.parametrize(
    "lengths", [[9, 0], [10, -1], [2**31 - 1, -(2**31) + 10], [3, 5], [2**31 - 1] * 2, [2**31 - 1, 2**31 - 1, 11]]
)
def test_runs_of_versions_must_cover_the_answers_exactly(lengths: list[int]) -> None:
    header, frames = sent(make_group())
    frames[3] = np.array([[1] * len(lengths), lengths], "<i4").tobytes()
    with pytest.raises(WireError, match=r"group.versions: got runs of -?\d+ tokens, expected 9, one or more in each"):
        read_group(header, frames, LIMITS)


def test_a_prompt_that_is_large_in_full_is_refused_though_it_travels_once() -> None:
    group = make_group(num_prompt_tokens=5000, answers=(1, 1, 1))
    header, frames = sent(group)
    assert sum(map(len, frames)) < 21_000
    with pytest.raises(
        WireError, match=r"got 240048 bytes in full, expected at most network.max_message_bytes, 200000"
    ):
        read_group(header, frames, replace(LIMITS, max_bytes=200_000))


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_group_with_frames_missing_or_left_over_is_refused(count: int) -> None:
    header, frames = sent(make_group())
    with pytest.raises(WireError, match=rf"got {count} array frames, expected 4"):
        read_group(header, [*frames, b""][:count], LIMITS)


def test_a_header_that_claims_more_tokens_than_there_are_costs_nothing() -> None:
    header, frames = sent(make_group())
    row = TrajectoryHeader(num_tokens=2**24, reward=0.0, is_truncated=False)
    huge = header.model_copy(update={"trajectories": (row,) * 4096})

    def read() -> None:
        with pytest.raises(WireError, match="expected 274877841424"):
            read_group(huge, frames, replace(LIMITS, group_size=4096, max_bytes=1 << 62))

    assert peak_bytes(read) < 4 << 20


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_damaged_groups_are_read_or_refused(data: st.DataObject) -> None:
    header, frames = sent(make_group())
    damaged = [bytearray(frame) for frame in frames]
    for _ in range(data.draw(st.integers(1, 3))):
        frame = damaged[data.draw(st.integers(0, 3))]
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        group = read_group(header, [bytes(frame) for frame in damaged], LIMITS).group()
    except WireError:
        return
    for trajectory in group.trajectories:
        assert np.isfinite(trajectory.logprobs).all()
        assert np.isfinite(trajectory.mask).all()
        assert 0 <= trajectory.tokens.min() <= trajectory.tokens.max() < LIMITS.vocab_size
        assert 0 <= trajectory.min_version <= trajectory.versions.max() <= LIMITS.max_version
