"""A TrajectoryGroup as a header and four little-endian frames, and back; as one blob for the journal.

The prompt, which all answers share, travels once. Versions, of which there are few, are told by runs. A mask that is 1
wherever a policy sampled, and 0 elsewhere, stays at home. So a group has about 8 bytes for each token of its answers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from common.wire.codec import Buffer, WireError, decode, pack, unpack
from common.wire.messages import GroupHeader, TrajectoryHeader

MAX_LOGPROB = 1e-3
"""Rounding may lift the log-prob of a certain token above 0."""
NUM_FRAMES = 4
BYTES_PER_TOKEN = 16
"""Of a trajectory: its id, log-prob, mask and version."""


@dataclass(frozen=True)
class GroupLimits:
    """What a group may be; taken from the run, so that nothing out of range is ever trained."""

    vocab_size: int
    group_size: int
    max_version: int
    """Newest version that exists; no token can be newer."""
    max_bytes: int = 64 << 20
    """Of the group in full, each trajectory with its prompt and four numbers a token: a small message may name a large
    one."""


def group_header(group: TrajectoryGroup, **envelope: Any) -> GroupHeader:
    rows = tuple(
        TrajectoryHeader(num_tokens=len(t.tokens), reward=t.reward, is_truncated=t.is_truncated)
        for t in group.trajectories
    )
    return GroupHeader(
        lease_id=group.lease_id, num_prompt_tokens=group.num_prompt_tokens, trajectories=rows,
        sampling_s=group.sampling_s, **envelope,
    )  # fmt: skip


def group_frames(group: TrajectoryGroup) -> list[Buffer]:
    """Tokens: the prompt, then all answers; log-probs and mask: of the answers; versions: of each run, then its length.

    Raises ValueError where the trajectories do not share their prompt, or a policy sampled it.
    """
    prompt = group.trajectories[0].tokens[: group.num_prompt_tokens]
    for t in group.trajectories:
        if len(t.tokens) <= len(prompt) or not np.array_equal(t.tokens[: len(prompt)], prompt):
            raise ValueError("group: got different prompts or an empty answer, expected answers to one prompt")
        asked = slice(len(prompt))
        if t.mask[asked].any() or t.logprobs[asked].any() or (t.versions[asked] != NOT_SAMPLED).any():
            raise ValueError("group: got loss or sampled tokens in the prompt, expected them after it")

    def answers(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(t, name)[len(prompt) :] for t in group.trajectories])

    versions, mask = answers("versions"), answers("mask").astype("<f4").tobytes()
    tokens = np.concatenate([prompt, answers("tokens")])
    return [
        tokens.astype("<i4").tobytes(),
        answers("logprobs").astype("<f4").tobytes(),
        b"" if mask == _plain_mask(versions).tobytes() else mask,
        _runs(versions).astype("<i4").tobytes(),
    ]


@dataclass(frozen=True)
class GroupArrays:
    """A group as it travels, views on its frames: A tokens of all answers, one after the other, and their prompt."""

    header: GroupHeader
    prompt: NDArray[np.int32]
    tokens: NDArray[np.int32]
    """[A], as the next two."""
    logprobs: NDArray[np.float32]
    mask: NDArray[np.float32] | None
    """None: 1 wherever a policy sampled, and 0 elsewhere."""
    runs: NDArray[np.int32]
    """[2, R] policy version and length of each run of equal versions; A tokens in all."""

    @cached_property
    def versions(self) -> NDArray[np.int32]:
        """[A] policy version of each token."""
        return np.repeat(*self.runs)

    @property
    def min_version(self) -> int:
        """The oldest that sampled a token."""
        return int(self._sampled_runs[0].min())

    @property
    def num_sampled(self) -> int:
        """Tokens that a policy sampled."""
        return int(self._sampled_runs[1].sum())

    @cached_property
    def _sampled_runs(self) -> NDArray[np.int32]:
        return self.runs[:, self.runs[0] != NOT_SAMPLED]

    @property
    def reward_sum(self) -> float:
        return sum(row.reward for row in self.header.trajectories)

    @property
    def bounds(self) -> list[int]:
        """Where each answer begins, and where the last one ends."""
        return [0, *accumulate(row.num_tokens - len(self.prompt) for row in self.header.trajectories)]

    def group(self) -> TrajectoryGroup:
        """The carrier."""
        empty = np.zeros(len(self.prompt), np.float32)
        mask = _plain_mask(self.versions) if self.mask is None else self.mask

        def whole(prompt: NDArray[Any], answer: NDArray[Any]) -> NDArray[Any]:
            return np.concatenate([prompt, answer])

        trajectories = tuple(
            Trajectory(
                whole(self.prompt, self.tokens[start:end]),
                whole(empty, self.logprobs[start:end]),
                whole(empty, mask[start:end]),
                whole(np.full_like(self.prompt, NOT_SAMPLED), self.versions[start:end]),
                row.reward,
                row.is_truncated,
            )
            for (start, end), row in zip(pairwise(self.bounds), self.header.trajectories, strict=True)
        )
        return TrajectoryGroup(self.header.lease_id, len(self.prompt), trajectories, self.header.sampling_s)


def read_group(header: GroupHeader, frames: Sequence[Buffer], limits: GroupLimits) -> GroupArrays:
    """Views on the frames, checked. Raises WireError."""
    if len(header.trajectories) != limits.group_size:
        raise WireError(f"group: got {len(header.trajectories)} trajectories, expected {limits.group_size}")
    if (num_bytes := BYTES_PER_TOKEN * sum(row.num_tokens for row in header.trajectories)) > limits.max_bytes:
        raise WireError(
            f"group: got {num_bytes} bytes in full, expected at most network.max_message_bytes, {limits.max_bytes}"
        )
    arrays = view_arrays(header, frames)
    _check_values(arrays, limits)
    _check_versions(arrays, limits)
    return arrays


def to_blob(frames: Sequence[Buffer]) -> bytes:
    """A group's message as one blob, for the journal: the header as it came, and its frames."""
    return pack(list(frames))


def from_blob(blob: bytes) -> TrajectoryGroup:
    """The group of a blob that was checked before it was written."""
    header, *frames = unpack(blob)
    message = decode([header], max_bytes=len(blob)).message
    assert isinstance(message, GroupHeader)
    return view_arrays(message, frames).group()


def view_arrays(header: GroupHeader, frames: Sequence[Buffer]) -> GroupArrays:
    """Of the right sizes, nothing more. Raises WireError."""
    if len(frames) != NUM_FRAMES:
        raise WireError(f"group: got {len(frames)} array frames, expected {NUM_FRAMES}")
    num_prompt, rows = header.num_prompt_tokens, header.trajectories
    shortest = min(row.num_tokens for row in rows)
    if shortest <= num_prompt:
        raise WireError(f"trajectory: got {shortest} tokens with a prompt of {num_prompt}, expected an answer")
    num_answers = sum(row.num_tokens for row in rows) - num_prompt * len(rows)
    tokens, logprobs, mask, runs = frames
    for name, frame, sizes in (
        ("tokens", tokens, (4 * (num_prompt + num_answers),)),
        ("logprobs", logprobs, (4 * num_answers,)),
        ("mask", mask, (0, 4 * num_answers)),
    ):
        if len(frame) not in sizes:
            raise WireError(f"group.{name}: got {len(frame)} bytes, expected {' or '.join(map(str, sizes))}")
    if not runs or len(runs) % 8:
        raise WireError(f"group.versions: got {len(runs)} bytes, expected 8 for each run, and one at least")
    told = np.frombuffer(runs, "<i4").reshape(2, -1)
    total = int(told[1].sum(dtype=np.int64))
    if total != num_answers or told[1].min() < 1:
        raise WireError(f"group.versions: got runs of {total} tokens, expected {num_answers}, one or more in each")
    ids = np.frombuffer(tokens, "<i4")
    return GroupArrays(
        header, ids[:num_prompt], ids[num_prompt:], np.frombuffer(logprobs, "<f4"),
        np.frombuffer(mask, "<f4") if mask else None, told,
    )  # fmt: skip


def _check_values(arrays: GroupArrays, limits: GroupLimits) -> None:
    """Of all answers at once, since a look at each costs ten times as much; NaN fails every comparison."""
    logprobs, mask = arrays.logprobs, arrays.mask
    for tokens in (arrays.prompt, arrays.tokens):
        if tokens.view("<u4").max() >= limits.vocab_size:  # so seen, a negative id is a large one
            raise WireError(
                f"trajectory.tokens: got ids {tokens.min()} to {tokens.max()}, expected 0 to {limits.vocab_size - 1}"
            )
    if not (logprobs.min() > -math.inf and logprobs.max() <= MAX_LOGPROB):
        raise WireError("trajectory.logprobs: got a value that is no log-prob, expected finite values of at most 0")
    if mask is None:
        return
    if not (mask.min() >= 0 and mask.max() < math.inf):
        raise WireError("trajectory.mask: got a negative or non-finite weight, expected finite values of at least 0")
    if mask[arrays.versions == NOT_SAMPLED].any():
        raise WireError("trajectory.mask: got loss on tokens that no policy sampled, expected 0 there")


def _check_versions(arrays: GroupArrays, limits: GroupLimits) -> None:
    """All exist, and a policy sampled something of every answer."""
    oldest, newest = int(arrays.runs[0].min()), int(arrays.runs[0].max())
    if not NOT_SAMPLED <= oldest <= newest <= limits.max_version:
        raise WireError(
            f"trajectory.versions: got {oldest} to {newest}, expected {NOT_SAMPLED} to {limits.max_version}"
        )
    if oldest > NOT_SAMPLED:
        return
    if not np.logical_or.reduceat(arrays.versions != NOT_SAMPLED, arrays.bounds[:-1]).all():
        raise WireError("trajectory.versions: got an answer without a sampled token, expected one in each")


def _runs(versions: NDArray[np.int32]) -> NDArray[np.int32]:
    """[2, R] value and length of each run of equal ones."""
    last = np.flatnonzero(versions[1:] != versions[:-1])
    bounds = np.concatenate([[0], last + 1, [len(versions)]])
    return np.stack([versions[bounds[:-1]], np.diff(bounds)])


def _plain_mask(versions: NDArray[np.int32]) -> NDArray[np.float32]:
    return (versions != NOT_SAMPLED).astype("<f4")
