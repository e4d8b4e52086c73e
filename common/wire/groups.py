"""A TrajectoryGroup as a header and four little-endian frames, and back without a copy; as one blob for the journal."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from common.wire.codec import Buffer, WireError, decode, encode, pack, unpack
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
    group = _view_group(header, frames)
    if len(group.trajectories) != limits.group_size:
        raise WireError(f"group: got {len(group.trajectories)} trajectories, expected {limits.group_size}")
    for trajectory in group.trajectories:
        _check_trajectory(trajectory, header.num_prompt_tokens, limits)
    first = group.trajectories[0].tokens[: header.num_prompt_tokens]
    if any(not np.array_equal(t.tokens[: header.num_prompt_tokens], first) for t in group.trajectories):
        raise WireError("group: the prompts of its trajectories differ, expected one prompt")
    return group


def to_blob(header: GroupHeader, frames: Sequence[Buffer]) -> bytes:
    """One blob, for the journal."""
    return pack([bytes(frame) for frame in encode(header, frames)])


def from_blob(blob: bytes) -> TrajectoryGroup:
    """The group of a blob that was checked before it was written."""
    frames: list[bytes] = unpack(blob)
    envelope = decode(frames, max_bytes=len(blob))
    assert isinstance(envelope.message, GroupHeader)
    return _view_group(envelope.message, envelope.frames)


def _view_group(header: GroupHeader, frames: Sequence[Buffer]) -> TrajectoryGroup:
    if len(frames) != len(ARRAYS):
        raise WireError(f"group: got {len(frames)} array frames, expected {len(ARRAYS)}")
    ends = np.cumsum([row.num_tokens for row in header.trajectories])
    columns = [
        np.split(_view_array(frame, dtype, int(ends[-1]), name), ends[:-1])
        for frame, (name, dtype) in zip(frames, ARRAYS, strict=True)
    ]
    trajectories = tuple(
        Trajectory(tokens, logprobs, mask, versions, row.reward, row.is_truncated)
        for tokens, logprobs, mask, versions, row in zip(*columns, header.trajectories, strict=True)
    )
    return TrajectoryGroup(header.lease_id, header.num_prompt_tokens, trajectories, header.sampling_s)


def _view_array(frame: Buffer, dtype: str, num_tokens: int, name: str) -> NDArray[Any]:
    if len(frame) != 4 * num_tokens:
        raise WireError(f"group.{name}: got {len(frame)} bytes, expected {4 * num_tokens}")
    return np.frombuffer(frame, dtype=dtype)


def _check_trajectory(trajectory: Trajectory, num_prompt_tokens: int, limits: GroupLimits) -> None:
    tokens, versions, mask, logprobs = trajectory.tokens, trajectory.versions, trajectory.mask, trajectory.logprobs
    sampled = versions != NOT_SAMPLED
    if len(tokens) <= num_prompt_tokens:
        raise WireError(
            f"trajectory: got {len(tokens)} tokens with a prompt of {num_prompt_tokens}, expected an answer"
        )
    if tokens.min() < 0 or tokens.max() >= limits.vocab_size:
        raise WireError(
            f"trajectory.tokens: got ids {tokens.min()} to {tokens.max()}, expected 0 to {limits.vocab_size - 1}"
        )
    if not np.isfinite(logprobs).all() or logprobs.max() > 1e-3:
        raise WireError("trajectory.logprobs: got a value that is no log-prob, expected finite values of at most 0")
    if not np.isfinite(mask).all() or mask.min() < 0:
        raise WireError("trajectory.mask: got a negative or non-finite weight, expected finite values of at least 0")
    if not sampled.any() or sampled[:num_prompt_tokens].any():
        raise WireError("trajectory.versions: got sampled tokens in the prompt or none at all, expected them after it")
    if mask[~sampled].any():
        raise WireError("trajectory.mask: got loss on tokens that no policy sampled, expected 0 there")
    if versions[sampled].min() < 0 or versions.max() > limits.max_version:
        raise WireError(f"trajectory.versions: got up to {versions.max()}, expected 0 to {limits.max_version}")
