"""Hostile messages: garbage, MessagePack of nasty shapes, and valid messages with something wrong in them."""

import random
import struct
from collections.abc import Sequence

import msgpack

from common.wire.messages import PROTOCOL

POOL = 1500
"""Messages made once; each use may be mutated further."""
NAMES = ("actor-0", "evaluator", "x" * 64, "a\x00b", "../../etc/passwd", "", "é" * 30)


class Payloads:
    """An endless, seeded stream of messages, each a list of frames."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        makers = (self._garbage, self._nasty_shape, self._almost_valid, self._almost_valid, self._many_frames)
        self._pool = [makers[number % len(makers)]() for number in range(POOL)]

    def draw(self) -> list[bytes]:
        """The next message; two in three are mutated anew."""
        chance = self._chance
        frames = self._pool[int(chance.random() * POOL)]
        kind = int(chance.random() * 6)
        if kind >= 4 or not frames[0]:
            return frames
        head, at = frames[0], int(chance.random() * len(frames[0]))
        match kind:
            case 0:
                head = head[:at]
            case 1:
                head = head[:at] + bytes([int(chance.random() * 256)]) + head[at + 1 :]
            case 2:
                head = head[:at] + head[at // 2 :]
            case _:
                head = head[:at] + b"\xff\xff\xff\xff" + head[at:]
        return [head, *frames[1:]]

    def _garbage(self) -> list[bytes]:
        return [self._chance.randbytes(self._chance.choice((0, 1, 7, 60, 900)))]

    def _nasty_shape(self) -> list[bytes]:
        depth, prefix = self._chance.choice((50, 500, 20_000)), b"\x82\xa8protocol\x01\xa4kind"
        claim = struct.pack(">I", self._chance.choice((1 << 16, (1 << 32) - 1)))
        shapes = [
            b"\x91" * depth + b"\xc0",
            b"\x81\xa1x" * depth + b"\xc0",
            prefix + b"\x91" * depth + b"\xc0",
            prefix + b"\xdd" + claim,
            b"\xdf" + claim,
            b"\xdb" + claim + b"short",
            b"\xc6" + claim,
            b"\xc9" + claim + b"\x05",
            b"\xdc\x1f\xff" + b"\x80" * 0x1FFF,
            msgpack.packb({"protocol": PROTOCOL, "kind": "hello", "x": [[{}] * 100] * 40}),
            msgpack.packb({"protocol": PROTOCOL, "kind": float("nan")}),
            b"\xdc\x00\x1e" + (b"\xc7\x0c\xff" + b"\xff" * 12) * 30,
            b"\x84" + b"\xa4kind\xa5hello" * 4,
        ]
        return [self._chance.choice(shapes)]

    def _almost_valid(self) -> list[bytes]:
        chance = self._chance
        header = {"protocol": PROTOCOL, **chance.choice(self._valid_headers())}
        for _ in range(chance.randrange(3)):
            header[chance.choice(list(header))] = chance.choice(
                [None, -1, 2**63, 1e308, float("inf"), "", "x" * 5000, b"\x00" * 100, [], [[[]]], {}, True, 2**53 + 1]
            )
        frames = [chance.randbytes(chance.choice((0, 4, 400))) for _ in range(chance.choice((0, 0, 1, 4, 5)))]
        return [msgpack.packb(header), *frames]

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
            {"kind": "evaluation", "version": version, "task": "t", "num_problems": 1, "num_correct": 1,
             "mean_score": 1.0, "mean_answer_tokens": 1.0, "wall_s": 1.0},
            {"kind": "goodbye", "reason": ""},
            {"kind": "manifest_request", "version": version},
            {"kind": "chunk_request", "version": version, "index": 2**53},
            {"kind": "welcome", "weights_port": 1, "announcements_port": 1, "newest": None},
        ]  # fmt: skip
