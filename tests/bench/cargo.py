"""What senders send: groups of eight answers of about 200 tokens, made once, in the wire's form and in JSON."""

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from common.wire.codec import PROTOCOL, Buffer
from common.wire.groups import group_frames, group_header

GROUP_SIZE = 8
PROMPT_TOKENS, ANSWER_TOKENS = 64, (150, 250)
VOCABULARY = 49_152
POOL = 16
"""Different groups of one sender."""
LEASE = "LEASE-ID"


ARRAYS = ("tokens", "logprobs", "mask", "versions")


class Form(StrEnum):
    """How much is said of a group."""

    PLAIN = "plain"
    """Each array of each trajectory, in full: what a user would send who gave it no thought."""
    TERSE = "terse"
    """What our own frames say: the prompt once, no mask that follows from the versions, versions by runs."""


@dataclass(frozen=True)
class Cargo:
    """One group in every form that it is sent in; the lease's name is put in when it is sent."""

    header: dict[str, Any]
    frames: dict[Form, list[Buffer]]
    text: dict[Form, tuple[bytes, bytes]]
    """JSON before and after the lease's name."""

    def message(self, lease_id: str, request_id: int, *, form: Form = Form.TERSE, **envelope: Any) -> list[Buffer]:
        """Terse: as an actor sends it."""
        header = self.header | {"lease_id": lease_id, "request_id": request_id} | envelope
        return [msgpack.packb(header), *self.frames[form]]

    def json(self, lease_id: str, form: Form) -> bytes:
        return lease_id.encode().join(self.text[form])

    def num_bytes(self, form: Form = Form.TERSE) -> int:
        return len(msgpack.packb(self.header)) + sum(len(frame) for frame in self.frames[form])


def make_cargo(seed: int, *, pool: int = POOL) -> list[Cargo]:
    numbers = np.random.default_rng(seed)
    return [_load(make_group(numbers)) for _ in range(pool)]


def make_group(
    numbers: np.random.Generator, *, prompt: int = PROMPT_TOKENS, answers: tuple[int, int] = ANSWER_TOKENS
) -> TrajectoryGroup:
    asked = numbers.integers(0, VOCABULARY, prompt)

    def trajectory() -> Trajectory:
        size = int(numbers.integers(*answers))
        sampled = np.arange(prompt + size) >= prompt
        tokens = np.concatenate([asked, numbers.integers(0, VOCABULARY, size)]).astype(np.int32)
        logprobs = np.where(sampled, -numbers.exponential(size=len(tokens)), 0).astype(np.float32)
        versions = np.where(sampled, 0, NOT_SAMPLED).astype(np.int32)
        reward = float(numbers.integers(0, 2))
        return Trajectory(tokens, logprobs, sampled.astype(np.float32), versions, reward, is_truncated=False)

    return TrajectoryGroup(LEASE, prompt, tuple(trajectory() for _ in range(GROUP_SIZE)), sampling_s=1.0)


def _load(group: TrajectoryGroup) -> Cargo:
    header = group_header(group).model_dump(mode="json") | {"protocol": PROTOCOL}
    plain = [np.concatenate([getattr(t, name) for t in group.trajectories]).tobytes() for name in ARRAYS]
    rows = [{name: _numbers(getattr(t, name)) for name in ARRAYS} for t in group.trajectories]
    answers = [
        {name: _numbers(getattr(t, name)[PROMPT_TOKENS:]) for name in ("tokens", "logprobs")}
        for t in group.trajectories
    ]
    prompt, versions = group.trajectories[0].tokens[:PROMPT_TOKENS].tolist(), [[0, group.num_answer_tokens]]
    return Cargo(
        header,
        {Form.PLAIN: list[Buffer](plain), Form.TERSE: group_frames(group)},
        {
            Form.PLAIN: _text(header, rows),
            Form.TERSE: _text(header | {"prompt": prompt, "versions": versions}, answers),
        },
    )


def _text(header: dict[str, Any], rows: list[dict[str, Any]]) -> tuple[bytes, bytes]:
    merged = [row | scalars for row, scalars in zip(rows, header["trajectories"], strict=True)]
    before, after = json.dumps(header | {"trajectories": merged}, separators=(",", ":")).split(LEASE)
    return before.encode(), after.encode()


def _numbers(array: NDArray[Any]) -> list[float]:
    """As short as JSON can say it: a whole number without its ".0", a log-prob with five places."""
    return [int(value) if value == int(value) else round(value, 5) for value in array.tolist()]
