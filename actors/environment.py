"""The environment protocol: asynchronous and multi-turn; SingleTurn is its simplest case.

An environment is found by name in the entry-point group `chord_rl.environments` and made with the run's seed and the
configuration's `environment.options`.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from common.chat import ChatMessage
from common.environments import find_environment
from common.errors import ConfigError
from common.problems import Split

Task = TypeVar("Task")

SCORER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="score")
"""Scores one answer after another: scorers need not be safe between threads, nor hold up an actor's other work."""


@dataclass(frozen=True)
class Turn:
    """What an environment says to an answer."""

    reward: float
    """Added to the trajectory's reward."""
    messages: tuple[ChatMessage, ...] = ()
    """What the policy reads next; empty ends the episode."""


class Episode(Protocol):
    """One attempt at one task."""

    async def begin(self) -> Sequence[ChatMessage]:
        """The opening conversation; equal for every attempt at the task."""
        ...

    async def answer(self, text: str) -> Turn:
        """Called with each answer of the policy, until a turn without messages."""
        ...


class Environment(Protocol):
    """Tasks by split and number. Held-out tasks share no prompt with training tasks."""

    full_reward: float
    """An episode with at least this reward counts as solved in an evaluation."""

    def episode(self, split: Split, index: int) -> Episode:
        """A new attempt at task `index`; held-out ones all differ. Raises IndexError past the last one."""
        ...


class SingleTurn(ABC, Generic[Task]):
    """An environment whose episodes are one prompt and one answer."""

    full_reward = 1.0

    @abstractmethod
    def task(self, split: Split, index: int) -> tuple[Task, Sequence[ChatMessage]]:
        """A task and its prompt; the same one for the same arguments, on any machine."""

    @abstractmethod
    def score(self, task: Task, text: str) -> float:
        """The reward of an answer."""

    def episode(self, split: Split, index: int) -> Episode:
        return SingleTurnEpisode(self, *self.task(split, index))


class SingleTurnEpisode:
    """One prompt, one answer."""

    def __init__(self, environment: "SingleTurn[Any]", task: Any, messages: Sequence[ChatMessage]) -> None:
        self._environment = environment
        self._task = task
        self._messages = messages

    async def begin(self) -> Sequence[ChatMessage]:
        return self._messages

    async def answer(self, text: str) -> Turn:
        loop = asyncio.get_running_loop()
        return Turn(await loop.run_in_executor(SCORER, self._environment.score, self._task, text))


def make_environment(name: str, *, seed: int, options: dict[str, Any]) -> Environment:
    """The environment that an installed package offers under `name`. Raises ConfigError where that fails."""
    offer = find_environment(name)
    try:
        return offer.load()(seed=seed, **options)
    except TypeError as error:
        raise ConfigError([f"environment.options: {name}: {error}"]) from error
