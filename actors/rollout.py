"""From a lease to a group: K episodes of one task, sampled at once, as trajectories."""

import asyncio
import time
from dataclasses import dataclass, replace
from itertools import count

import numpy as np

from actors.engine import Answer, FinishReason, SamplingParameters
from actors.environment import Environment, Episode, answer_in_time, begin_in_time
from actors.guard import EngineGuard
from common.chat import Chat
from common.config.schema import Actor
from common.trajectory import NOT_SAMPLED, Trajectory, TrajectoryGroup
from common.wire.messages import Lease


class PromptTooLong(Exception):
    """The conversation leaves no room for an answer."""


@dataclass(frozen=True, eq=False)
class Attempt:
    """One episode from its beginning to its end."""

    trajectory: Trajectory
    num_prompt_tokens: int
    question: str
    """The last message before the first answer."""
    text: str
    """The last answer."""
    is_parsed: bool
    """Whether the environment could read that answer."""


class Tape:
    """The tokens of one episode as they come."""

    def __init__(self, prompt: list[int]) -> None:
        self.tokens: list[int] = []
        self._logprobs: list[np.ndarray] = []
        self._mask: list[np.ndarray] = []
        self._versions: list[np.ndarray] = []
        self.read(prompt)

    def read(self, tokens: list[int]) -> None:
        """Tokens that the policy reads."""
        self._extend(tokens, np.zeros(len(tokens)), np.zeros(len(tokens)), np.full(len(tokens), NOT_SAMPLED))

    def write(self, answer: Answer) -> None:
        """Tokens that the policy wrote."""
        self._extend(answer.tokens.tolist(), answer.logprobs, np.ones(len(answer.tokens)), answer.versions)

    def _extend(self, tokens: list[int], logprobs: np.ndarray, mask: np.ndarray, versions: np.ndarray) -> None:
        self.tokens += tokens
        self._logprobs.append(logprobs)
        self._mask.append(mask)
        self._versions.append(versions)

    def trajectory(self, reward: float, *, is_truncated: bool) -> Trajectory:
        return Trajectory(
            tokens=np.array(self.tokens, dtype=np.int32),
            logprobs=np.minimum(np.concatenate(self._logprobs), 0.0).astype(np.float32),
            mask=np.concatenate(self._mask).astype(np.float32),
            versions=np.concatenate(self._versions).astype(np.int32),
            reward=reward,
            is_truncated=is_truncated,
        )


class Rollout:
    """Runs episodes with an engine; keeps no state between them."""

    def __init__(self, guard: EngineGuard, environment: Environment, chat: Chat, limits: Actor) -> None:
        self._guard = guard
        self._environment = environment
        self._chat = chat
        self._max_model_tokens = limits.max_model_tokens
        self._score_timeout_s = limits.score_timeout_s

    async def group(self, lease: Lease) -> TrajectoryGroup:
        """All answers to a lease's prompt. Raises a group of SamplingFailed, PromptTooLong, WaitTimeout, and what the
        environment raises."""
        started = time.monotonic()
        sampling = SamplingParameters(temperature=lease.temperature, max_tokens=lease.max_tokens)
        episodes = [self._environment.episode("train", lease.prompt_index) for _ in range(lease.group_size)]
        async with asyncio.TaskGroup() as running:
            tasks = [
                running.create_task(self.episode(episode, replace(sampling, seed=lease.seed + k)))
                for k, episode in enumerate(episodes)
            ]
        attempts = [task.result() for task in tasks]
        num_prompt_tokens = min(attempt.num_prompt_tokens for attempt in attempts)
        trajectories = tuple(attempt.trajectory for attempt in attempts)
        return TrajectoryGroup(lease.lease_id, num_prompt_tokens, trajectories, time.monotonic() - started)

    async def episode(self, episode: Episode, sampling: SamplingParameters) -> Attempt:
        """One episode to its end."""
        opening = await begin_in_time(episode, limit_s=self._score_timeout_s)
        prompt = self._chat.prompt_tokens(opening)
        tape, reward, turns = Tape(prompt), 0.0, count()
        while True:
            answer = await self._sample(tape.tokens, sampling.of_turn(next(turns)))
            tape.write(answer)
            text = self._chat.text(answer.tokens.tolist())
            is_truncated = answer.finish is FinishReason.LENGTH
            turn = await answer_in_time(episode, text, is_truncated=is_truncated, limit_s=self._score_timeout_s)
            reward += turn.reward
            is_over = is_truncated or not turn.messages
            if not is_over:
                tape.read(self._chat.continuation_tokens(turn.messages))
                is_over = is_truncated = len(tape.tokens) >= self._max_model_tokens
            if is_over:
                trajectory = tape.trajectory(reward, is_truncated=is_truncated)
                return Attempt(trajectory, len(prompt), opening[-1].content, text, turn.is_parsed)

    async def _sample(self, tokens: list[int], sampling: SamplingParameters) -> Answer:
        room = self._max_model_tokens - len(tokens)
        if room < 1:
            raise PromptTooLong(
                f"got a prompt of {len(tokens)} tokens, expected fewer than actor.max_model_tokens "
                f"({self._max_model_tokens})"
            )
        return await self._guard.sample(list(tokens), replace(sampling, max_tokens=min(sampling.max_tokens, room)))
