"""Hostile messages: garbage, MessagePack of nasty shapes, and valid messages with something wrong in them.

`mutate` and `junk_frames` are plain functions of a random generator; `Payloads` is a fast stream for a siege.
"""

import random
import struct
from collections.abc import Sequence

import msgpack

from common.version import Version
from common.wire.codec import encode
from common.wire.groups import group_frames, group_header
from common.wire.messages import (
    PROTOCOL,
    ActorState,
    Announcement,
    Chunk,
    ChunkRequest,
    Goodbye,
    Hello,
    LeaseFailure,
    ManifestReply,
    ManifestRequest,
    Message,
    Role,
    TransferRequest,
    TransferStart,
    WorkRequest,
)
from tests.test_inbox import make_group, result_for

POOL = 1500
"""Messages made once; each use may be mutated further."""
NAMES = ("actor-0", "evaluator", "x" * 64, "a\x00b", "../../etc/passwd", "", "é" * 30)


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


def good_messages(version: Version, lease_id: str) -> list[list[bytes]]:
    """One of each kind that a peer sends, encoded: of a run that is at `version`, about a lease."""
    group = make_group(lease_id)
    plain: list[Message] = [
        Hello(peer_id="a", session="s", role=Role.ACTOR, engine="e", config_hash="c"),
        WorkRequest(state=ActorState.SERVING, capacity=3, serving=version, held=(lease_id, "2.b")),
        LeaseFailure(lease_id=lease_id, reason="no"), Goodbye(), ManifestRequest(version=version),
        ChunkRequest(version=version, index=1, base="cd" * 16), Announcement(version=version), result_for(version),
        TransferRequest(version=version, num_workers=1, is_member=True), TransferStart(version=version),
    ]  # fmt: skip
    framed = [
        encode(group_header(group).stamped(version), group_frames(group)),
        encode(ManifestReply(version=version, num_bytes=5, chunk_bytes=2), [bytes(48)]),
        encode(Chunk(version=version, index=0, num_deltas=1), [bytes(100)]),
    ]
    return [
        [bytes(frame) for frame in frames] for frames in [*(encode(one.stamped(version)) for one in plain), *framed]
    ]


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
    return [_pack({"protocol": PROTOCOL, "kind": kind} | header)]


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


class Payloads:
    """An endless, seeded stream of messages, each a list of frames."""

    def __init__(self, chance: random.Random, *, pool: int = POOL) -> None:
        self._chance = chance
        makers = (self._garbage, self._nasty_shape, self._almost_valid, self._almost_valid, self._many_frames)
        self._pool = [chance.choice(makers)() for _ in range(pool)]

    def draw(self) -> list[bytes]:
        """The next message; two in three are mutated anew."""
        frames = self._chance.choice(self._pool)
        return (mutate(frames, self._chance) if self._chance.random() < 2 / 3 else frames) or [b""]

    def _garbage(self) -> list[bytes]:
        return [self._chance.randbytes(self._chance.choice((0, 1, 7, 60, 900)))]

    def _nasty_shape(self) -> list[bytes]:
        depth, prefix = self._chance.choice((50, 500, 20_000)), b"\x82\xa8protocol" + bytes([PROTOCOL]) + b"\xa4kind"
        claim = struct.pack(">I", self._chance.choice((1 << 16, (1 << 32) - 1)))
        shapes = [
            b"\x91" * depth + b"\xc0",
            b"\x81\xa1x" * depth + b"\xc0",
            prefix + b"\x91" * depth + b"\xc0",
            _pack({"protocol": PROTOCOL, "kind": "work_request", "held": _nested(min(depth, 500))}),
            _pack({"protocol": PROTOCOL, "kind": "group", "trajectories": [{"reward": _nested(min(depth, 500))}] * 2}),
            prefix + b"\xdd" + claim,
            b"\xdf" + claim,
            b"\xdb" + claim + b"short",
            b"\xc6" + claim,
            b"\xc9" + claim + b"\x05",
            b"\xdc\x1f\xff" + b"\x80" * 0x1FFF,
            _pack({"protocol": PROTOCOL, "kind": "hello", "x": [[{}] * 100] * 40}),
            _pack({"protocol": PROTOCOL, "kind": float("nan")}),
            b"\xdc\x00\x1e" + (b"\xc7\x0c\xff" + b"\xff" * 12) * 30,
            b"\x84" + b"\xa4kind\xa5hello" * 4,
        ]
        return [self._chance.choice(shapes)]

    def _almost_valid(self) -> list[bytes]:
        chance = self._chance
        header: dict[str, object] = {"protocol": PROTOCOL, **chance.choice(self._valid_headers())}
        for _ in range(chance.randrange(3)):
            header[chance.choice(list(header))] = chance.choice(
                [None, -1, 2**63, 1e308, float("inf"), "", "x" * 5000, b"\x00" * 100, [], [[[]]], {}, True, 2**53 + 1]
            )
        frames = [chance.randbytes(chance.choice((0, 4, 400))) for _ in range(chance.choice((0, 0, 1, 4, 5)))]
        return [_pack(header), *frames]

    def _many_frames(self) -> list[bytes]:
        return [b"\x80"] + [self._chance.randbytes(self._chance.choice((0, 1, 100)))] * self._chance.choice((7, 60))

    def _valid_headers(self) -> Sequence[dict[str, object]]:
        name = self._chance.choice(NAMES)
        version = {"run_id": name, "incarnation": 1, "step": 0, "hash": "ab" * 16}
        rows = [{"num_tokens": 2**24, "reward": 1.0, "is_truncated": False}] * self._chance.choice((2, 4096))
        return [
            {"kind": "hello", "peer_id": name, "session": "s", "role": "actor", "engine": "e", "config_hash": "c"},
            {"kind": "work_request", "state": "serving", "capacity": 4096, "serving": version, "held": ["1.a"] * 500},
            {"kind": "group", "lease_id": "1.a", "num_prompt_tokens": 1, "trajectories": rows},
            {"kind": "lease_failure", "lease_id": "1.a", "reason": "x" * 500},
            {"kind": "evaluation", "version": version, "scores": [
                {"task": f"t/{number}", "num_problems": 1, "samples_per_problem": 2, "num_correct": 1,
                 "num_unparsed": 0, "num_truncated": 0, "confidence_95": [0.0, 1.0], "pass_at_k": {"1": 0.5, "2": 1.0},
                 "categories": {name or "law": 0.5}, "mean_score": 1.0, "mean_answer_tokens": 1.0, "wall_s": 1.0}
                for number in range(self._chance.choice((1, 32)))]},
            {"kind": "goodbye", "reason": ""},
            {"kind": "manifest_request", "version": version},
            {"kind": "chunk_request", "version": version, "index": 2**53},
            {"kind": "welcome", "weights_port": 1, "announcements_port": 1, "newest": None},
        ]  # fmt: skip


def _pack(header: object) -> bytes:
    return bytes(msgpack.packb(header) or b"")


def _nested(depth: int) -> object:
    value: object = None
    for _ in range(depth):
        value = [value]
    return value
