"""A TrajectoryGroup as a header and four little-endian frames, and back without a copy; as one blob for the journal."""

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


@dataclass(frozen=True)
class GroupArrays:
    """A group as it travels: each array of all trajectories, one after the other. Views on the frames."""

    header: GroupHeader
    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    mask: NDArray[np.float32]
    versions: NDArray[np.int32]

    @cached_property
    def version_runs(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Versions, of which there are few, told by runs: the version of each, and its tokens."""
        versions = self.versions
        last = np.flatnonzero(versions[1:] != versions[:-1])
        bounds = np.empty(len(last) + 2, "<i4")
        bounds[0], bounds[1:-1], bounds[-1] = 0, last + 1, len(versions)
        return versions[bounds[:-1]], bounds[1:] - bounds[:-1]

    @cached_property
    def is_mask_plain(self) -> bool:
        """Whether it is 1 wherever a policy sampled and 0 elsewhere."""
        return self.mask.tobytes() == _plain_mask(self.versions).tobytes()

    @property
    def min_version(self) -> int:
        """The oldest that sampled a token."""
        return min(version for version in self.version_runs[0].tolist() if version != NOT_SAMPLED)

    @property
    def num_sampled(self) -> int:
        """Tokens that a policy sampled."""
        firsts, runs = self.version_runs
        return int(runs[firsts != NOT_SAMPLED].sum())

    @cached_property
    def ends(self) -> list[int]:
        """Where each trajectory ends in the arrays."""
        return list(accumulate(row.num_tokens for row in self.header.trajectories))

    @property
    def reward_sum(self) -> float:
        return sum(row.reward for row in self.header.trajectories)

    def group(self) -> TrajectoryGroup:
        """The carrier, views on the frames as well."""
        trajectories = tuple(
            Trajectory(
                self.tokens[start:end], self.logprobs[start:end], self.mask[start:end], self.versions[start:end],
                row.reward, row.is_truncated,
            )
            for start, end, row in zip([0, *self.ends], self.ends, self.header.trajectories, strict=False)
        )  # fmt: skip
        return TrajectoryGroup(
            self.header.lease_id, self.header.num_prompt_tokens, trajectories, self.header.sampling_s
        )  # fmt: skip


def read_group(header: GroupHeader, frames: Sequence[Buffer], limits: GroupLimits) -> GroupArrays:
    """Views on the frames, checked. Raises WireError."""
    arrays = view_arrays(header, frames)
    if len(header.trajectories) != limits.group_size:
        raise WireError(f"group: got {len(header.trajectories)} trajectories, expected {limits.group_size}")
    shortest = min(row.num_tokens for row in header.trajectories)
    if shortest <= header.num_prompt_tokens:
        raise WireError(
            f"trajectory: got {shortest} tokens with a prompt of {header.num_prompt_tokens}, expected an answer"
        )
    _check_values(arrays, limits)
    _check_prompts(arrays)
    return arrays


def to_blob(header: Buffer, arrays: GroupArrays) -> bytes:
    """One blob, for the journal: the header as it came, and half as many bytes as the frames have.

    A mask that is 1 wherever a policy sampled is left out, and versions, of which there are few, are told by runs.
    """
    firsts, runs = arrays.version_runs
    mask = b"" if arrays.is_mask_plain else arrays.mask.tobytes()
    return pack([header, arrays.tokens.tobytes(), arrays.logprobs.tobytes(), mask, firsts.tobytes(), runs.tobytes()])


def from_blob(blob: bytes) -> TrajectoryGroup:
    """The group of a blob that was checked before it was written."""
    header, tokens, logprobs, mask, firsts, runs = unpack(blob)
    message = decode([header], max_bytes=len(blob)).message
    assert isinstance(message, GroupHeader)
    versions = np.repeat(np.frombuffer(firsts, "<i4"), np.frombuffer(runs, "<i4"))
    return GroupArrays(
        message,
        np.frombuffer(tokens, "<i4"),
        np.frombuffer(logprobs, "<f4"),
        np.frombuffer(mask, "<f4") if mask else _plain_mask(versions),
        versions,
    ).group()


def _plain_mask(versions: NDArray[np.int32]) -> NDArray[np.float32]:
    return (versions != NOT_SAMPLED).astype("<f4")


def view_arrays(header: GroupHeader, frames: Sequence[Buffer]) -> GroupArrays:
    """Of the right sizes, nothing more. Raises WireError."""
    if len(frames) != len(ARRAYS):
        raise WireError(f"group: got {len(frames)} array frames, expected {len(ARRAYS)}")
    num_bytes = 4 * sum(row.num_tokens for row in header.trajectories)
    for frame, (name, _) in zip(frames, ARRAYS, strict=True):
        if len(frame) != num_bytes:
            raise WireError(f"group.{name}: got {len(frame)} bytes, expected {num_bytes}")
    return GroupArrays(header, *(np.frombuffer(frame, dtype) for frame, (_, dtype) in zip(frames, ARRAYS, strict=True)))


def _check_values(arrays: GroupArrays, limits: GroupLimits) -> None:
    """Of all trajectories at once, since a look at each costs ten times as much; NaN fails every comparison."""
    tokens, logprobs, mask = arrays.tokens, arrays.logprobs, arrays.mask
    if tokens.view("<u4").max() >= limits.vocab_size:  # so seen, a negative id is a large one
        raise WireError(
            f"trajectory.tokens: got ids {tokens.min()} to {tokens.max()}, expected 0 to {limits.vocab_size - 1}"
        )
    if not (logprobs.min() > -math.inf and logprobs.max() <= MAX_LOGPROB):
        raise WireError("trajectory.logprobs: got a value that is no log-prob, expected finite values of at most 0")
    if not arrays.is_mask_plain:
        if not (mask.min() >= 0 and mask.max() < math.inf):
            raise WireError("trajectory.mask: got a negative or non-finite weight, expected finite values from 0 on")
        if mask[arrays.versions == NOT_SAMPLED].any():
            raise WireError("trajectory.mask: got loss on tokens that no policy sampled, expected 0 there")
    versions = arrays.version_runs[0].tolist()
    if not (min(versions) >= NOT_SAMPLED and max(versions) <= limits.max_version):
        raise WireError(f"trajectory.versions: got up to {max(versions)}, expected 0 to {limits.max_version}")


def _check_prompts(arrays: GroupArrays) -> None:
    """One prompt, which no policy sampled, and an answer to it in every trajectory."""
    size = arrays.header.num_prompt_tokens
    tokens, is_sampled = arrays.tokens.tobytes(), (arrays.versions != NOT_SAMPLED).tobytes()
    for start, end in pairwise([0, *arrays.ends]):
        if is_sampled.find(1, start, start + size) >= 0 or is_sampled.find(1, start + size, end) < 0:
            raise WireError(
                "trajectory.versions: got sampled tokens in the prompt or none at all, expected them after it"
            )
        if tokens[4 * start : 4 * (start + size)] != tokens[: 4 * size]:
            raise WireError("group: the prompts of its trajectories differ, expected one prompt")
