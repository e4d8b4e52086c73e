"""The carriers of experience: one trajectory is one answer (or conversation), a group is K of them to one prompt."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOT_SAMPLED = -1
"""Policy version of a token that no policy sampled: prompt or environment reply."""


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """All tokens of one episode in order, T of them: prompt, answers, and replies of the environment between them."""

    tokens: NDArray[np.int32]
    """[T] token ids."""
    logprobs: NDArray[np.float32]
    """[T] behaviour log-prob of each sampled token; 0 elsewhere."""
    mask: NDArray[np.float32]
    """[T] loss weight; 1 on sampled tokens as a rule, 0 elsewhere."""
    versions: NDArray[np.int32]
    """[T] policy version that sampled each token; NOT_SAMPLED elsewhere."""
    reward: float
    """The environment's sum over the episode."""
    is_truncated: bool
    """Whether an answer reached the token limit before it ended."""

    @property
    def min_version(self) -> int:
        """Oldest policy version among the sampled tokens."""
        sampled = self.versions[self.versions != NOT_SAMPLED]
        return int(sampled.min())

    @property
    def num_answer_tokens(self) -> int:
        return int((self.versions != NOT_SAMPLED).sum())

    @property
    def num_last_answer_tokens(self) -> int:
        """Of the last turn alone; 0 where the last word is the environment's."""
        return int((self.versions[::-1] == NOT_SAMPLED).argmax())


@dataclass(frozen=True, slots=True, eq=False)
class TrajectoryGroup:
    """K trajectories of one prompt, sampled under one lease."""

    lease_id: str
    num_prompt_tokens: int
    """Tokens at the start that all K share."""
    trajectories: tuple[Trajectory, ...]
    sampling_s: float = 0.0
    """From the lease to the finished group, by the actor's clock."""

    @property
    def min_version(self) -> int:
        """Oldest policy version among the group's sampled tokens; its staleness counts from here."""
        return int(self._sampled_versions.min())

    @property
    def num_answer_tokens(self) -> int:
        """Of all K together."""
        return len(self._sampled_versions)

    @property
    def _sampled_versions(self) -> NDArray[np.int32]:
        versions = np.concatenate([trajectory.versions for trajectory in self.trajectories])
        return versions[versions != NOT_SAMPLED]

    @property
    def reward_sum(self) -> float:
        return sum(trajectory.reward for trajectory in self.trajectories)
