"""From a group's rewards to its advantages: what becomes of answers cut off, and which groups have a signal."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.config.schema import Config
from common.trajectory import TrajectoryGroup
from learner.objective.advantages import group_advantages
from learner.objective.rewards import soft_overlong_penalty

OVERLONG_REWARD = -1.0
"""The paper's reward of an answer over the limit."""


@dataclass(frozen=True)
class Shaping:
    """What the run's configuration says of rewards and advantages."""

    scale: Literal["std", "none"]
    overlong: Literal["keep", "penalty", "mask", "soft_penalty"]
    max_tokens: int
    buffer_tokens: int

    @classmethod
    def of(cls, config: Config) -> "Shaping":
        algorithm = config.algorithm
        return cls(
            algorithm.advantage_scale, algorithm.overlong, config.sampling.max_tokens, algorithm.overlong_buffer_tokens
        )

    def advantages(self, group: TrajectoryGroup) -> Tensor:
        """[K], one for each trajectory."""
        is_truncated = torch.tensor([t.is_truncated for t in group.trajectories])
        advantages = group_advantages(self._rewards(group, is_truncated), scale=self.scale)
        # Its tokens stay in the denominator: the other answers must not weigh more because this one was cut off.
        return torch.where(is_truncated, 0.0, advantages) if self.overlong == "mask" else advantages

    def has_signal(self, group: TrajectoryGroup) -> bool:
        """Whether GRPO learns anything from the group."""
        return bool(self.advantages(group).any())

    def _rewards(self, group: TrajectoryGroup, is_truncated: Tensor) -> Tensor:
        rewards = torch.tensor([t.reward for t in group.trajectories], dtype=torch.float32)
        if self.overlong == "penalty":
            return torch.where(is_truncated, OVERLONG_REWARD, rewards)
        if self.overlong == "soft_penalty":
            lengths = torch.tensor([t.num_last_answer_tokens for t in group.trajectories])
            return rewards + soft_overlong_penalty(
                lengths, max_tokens=self.max_tokens, buffer_tokens=self.buffer_tokens
            )
        return rewards
