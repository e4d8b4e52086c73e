"""A TrajectoryGroup as a header and four little-endian frames, and back without a copy; as one blob for the journal."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from common.wire.codec import Buffer, WireError, decode, pack, unpack
from common.wire.messages import GroupHeader, TrajectoryHeader

ARRAYS = (("tokens", "<i4"), ("logprobs", "<f4"), ("mask", "<f4"), ("versions", "<i4"))


@dataclass(frozen=True)
class GroupLimits:
    """What a group may be; taken from the run, so that nothing out of range is ever trained."""

    vocab_size: int
    group_size: int
    max_version: int
    """Newest version that exists; no token can be newer."""


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
    """Each array of all trajectories, one after the other."""
    return [
        np.concatenate([getattr(t, name) for t in group.trajectories]).astype(dtype, copy=False).tobytes()
        for name, dtype in ARRAYS
    ]


def read_group(header: GroupHeader, frames: Sequence[Buffer], limits: GroupLimits) -> TrajectoryGroup:
    """Views on the frames, checked. Raises WireError."""
    arrays = _view_arrays(header, frames)
    if len(header.trajectories) != limits.group_size:
        raise WireError(f"group: got {len(header.trajectories)} trajectories, expected {limits.group_size}")
    shortest = min(row.num_tokens for row in header.trajectories)
    if shortest <= header.num_prompt_tokens:
        raise WireError(
            f"trajectory: got {shortest} tokens with a prompt of {header.num_prompt_tokens}, expected an answer"
        )
    _check_values(arrays, limits)
    group = _divide(header, arrays)
    _check_prompts(group)
    return group


def to_blob(frames: Sequence[Buffer]) -> bytes:
    """One blob, for the journal, of the frames of a message as it came, its header first."""
    return pack(frames)


def from_blob(blob: bytes) -> TrajectoryGroup:
    """The group of a blob that was checked before it was written."""
    frames: list[bytes] = unpack(blob)
    envelope = decode(frames, max_bytes=len(blob))
    assert isinstance(envelope.message, GroupHeader)
    return _divide(envelope.message, _view_arrays(envelope.message, envelope.frames))


@dataclass(frozen=True)
class _Arrays:
    """The frames as they are: each array of all trajectories, one after the other."""

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    mask: NDArray[np.float32]
    versions: NDArray[np.int32]


def _view_arrays(header: GroupHeader, frames: Sequence[Buffer]) -> _Arrays:
    if len(frames) != len(ARRAYS):
        raise WireError(f"group: got {len(frames)} array frames, expected {len(ARRAYS)}")
    num_bytes = 4 * sum(row.num_tokens for row in header.trajectories)
    for frame, (name, _) in zip(frames, ARRAYS, strict=True):
        if len(frame) != num_bytes:
            raise WireError(f"group.{name}: got {len(frame)} bytes, expected {num_bytes}")
    return _Arrays(*(np.frombuffer(frame, dtype) for frame, (_, dtype) in zip(frames, ARRAYS, strict=True)))


def _divide(header: GroupHeader, arrays: _Arrays) -> TrajectoryGroup:
    ends = list(accumulate(row.num_tokens for row in header.trajectories))
    trajectories = tuple(
        Trajectory(
            arrays.tokens[start:end], arrays.logprobs[start:end], arrays.mask[start:end], arrays.versions[start:end],
            row.reward, row.is_truncated,
        )
        for start, end, row in zip([0, *ends], ends, header.trajectories, strict=False)
    )  # fmt: skip
    return TrajectoryGroup(header.lease_id, header.num_prompt_tokens, trajectories, header.sampling_s)


def _check_values(arrays: _Arrays, limits: GroupLimits) -> None:
    """Of all trajectories at once: a look at each costs ten times as much."""
    tokens, logprobs, mask, versions = arrays.tokens, arrays.logprobs, arrays.mask, arrays.versions
    if tokens.min() < 0 or tokens.max() >= limits.vocab_size:
        raise WireError(
            f"trajectory.tokens: got ids {tokens.min()} to {tokens.max()}, expected 0 to {limits.vocab_size - 1}"
        )
    if not np.isfinite(logprobs).all() or logprobs.max() > 1e-3:
        raise WireError("trajectory.logprobs: got a value that is no log-prob, expected finite values of at most 0")
    if not np.isfinite(mask).all() or mask.min() < 0:
        raise WireError("trajectory.mask: got a negative or non-finite weight, expected finite values of at least 0")
    if mask[versions == NOT_SAMPLED].any():
        raise WireError("trajectory.mask: got loss on tokens that no policy sampled, expected 0 there")
    if versions.min() < NOT_SAMPLED or versions.max() > limits.max_version:
        raise WireError(f"trajectory.versions: got up to {versions.max()}, expected 0 to {limits.max_version}")


def _check_prompts(group: TrajectoryGroup) -> None:
    """One prompt, which no policy sampled, and an answer to it in every trajectory."""
    size = group.num_prompt_tokens
    first = group.trajectories[0].tokens[:size]
    for trajectory in group.trajectories:
        if (trajectory.versions[:size] != NOT_SAMPLED).any() or trajectory.versions[size:].max() == NOT_SAMPLED:
            raise WireError(
                "trajectory.versions: got sampled tokens in the prompt or none at all, expected them after it"
            )
        if not np.array_equal(trajectory.tokens[:size], first):
            raise WireError("group: the prompts of its trajectories differ, expected one prompt")
