"""The environment protocol: asynchronous and multi-turn; SingleTurn is its simplest case.

An environment is found by name in the entry-point group `chord_rl.environments` and made with the run's seed and the
configuration's `environment.options`.
"""

import asyncio
import inspect
import math
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from common.chat import ChatMessage
from common.environments import find_environment
from common.errors import ConfigError
from common.problems import Split
from common.wait import wait_for

Task = TypeVar("Task")

ENVIRONMENT = "the environment"
"""Whom a wait for it names."""


class Scorer:
    """Scores one answer after another: scorers need not be safe between threads, nor hold up an actor's other work."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="score")
        self.begun_s = -math.inf
        """When it began with the answer that it judges, or judged last, on the monotonic clock."""


SCORER = Scorer()
"""The one of this process."""


@dataclass(frozen=True)
class Turn:
    """What an environment says to an answer."""

    reward: float
    """Added to the trajectory's reward."""
    messages: tuple[ChatMessage, ...] = ()
    """What the policy reads next; empty ends the episode."""
    is_parsed: bool = True
    """Whether the environment found in the answer what it looks for; evaluations count those in which it did not."""


@dataclass(frozen=True)
class Judgement:
    """What a scorer makes of one answer."""

    reward: float
    is_parsed: bool = True


class Episode(Protocol):
    """One attempt at one task."""

    category: str
    """What evaluations tell accuracies apart by; empty where there is nothing to tell apart."""

    async def begin(self) -> Sequence[ChatMessage]:
        """The opening conversation; equal for every attempt at the task."""
        ...

    async def answer(self, text: str, *, is_truncated: bool) -> Turn:
        """Called with each answer of the policy, until a turn without messages. A truncated one is the last."""
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

    def judge(self, task: Task, text: str, *, is_truncated: bool) -> Judgement:
        """The reward of an answer, and whether it could be read at all: for environments that tell these apart."""
        return Judgement(self.score(task, text))

    def category(self, task: Task) -> str:
        """What evaluations tell accuracies apart by."""
        return ""

    def episode(self, split: Split, index: int) -> Episode:
        return SingleTurnEpisode(self, *self.task(split, index))


class SingleTurnEpisode:
    """One prompt, one answer."""

    def __init__(self, environment: "SingleTurn[Any]", task: Any, messages: Sequence[ChatMessage]) -> None:
        self._environment = environment
        self._task = task
        self._messages = messages
        self._begun_s: float | None = None
        self.category: str = environment.category(task)

    async def begin(self) -> Sequence[ChatMessage]:
        return self._messages

    async def answer(self, text: str, *, is_truncated: bool) -> Turn:
        judge = partial(self._judge, text, is_truncated=is_truncated)
        judgement = await asyncio.get_running_loop().run_in_executor(SCORER.thread, judge)
        return Turn(judgement.reward, is_parsed=judgement.is_parsed)

    def _judge(self, text: str, *, is_truncated: bool) -> Judgement:
        """In the scorer's thread."""
        self._begun_s = SCORER.begun_s = time.monotonic()
        return self._environment.judge(self._task, text, is_truncated=is_truncated)

    def counted_from(self, limit_s: float) -> float:
        """The moment from which `limit_s` counts, on the monotonic clock: when the judging of its answer began, or,
        until it has, when the limit of the answer that the scorer has at hand is over.

        So an answer that is given up costs those behind it nothing, unless the scorer does not come back from it.
        """
        return SCORER.begun_s + limit_s if self._begun_s is None else self._begun_s


async def begin_in_time(episode: Episode, *, limit_s: float) -> Sequence[ChatMessage]:
    """The opening conversation. Raises WaitTimeout where it takes longer."""
    return await wait_for(episode.begin(), "a prompt", whom=ENVIRONMENT, limit_s=limit_s, is_quiet=True)


async def answer_in_time(episode: Episode, text: str, *, is_truncated: bool, limit_s: float) -> Turn:
    """What the environment says to an answer. Raises WaitTimeout where it takes longer; waiting in the scorer's line
    does not count, as long as the scorer gets on."""
    since = partial(episode.counted_from, limit_s) if isinstance(episode, SingleTurnEpisode) else None
    answering = episode.answer(text, is_truncated=is_truncated)
    return await wait_for(answering, "a score", whom=ENVIRONMENT, limit_s=limit_s, is_quiet=True, since=since)


def make_environment(name: str, *, seed: int, options: dict[str, Any]) -> Environment:
    """The environment that an installed package offers under `name`. Raises ConfigError where that fails."""
    make = find_environment(name).load()
    signature = inspect.signature(make)
    hands_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())
    is_bound = False
    try:
        signature.bind(seed=seed, **options)
        is_bound = True
        return make(seed=seed, **options)
    except TypeError as error:
        mistake = _mistake_in(options, str(error))
        if not mistake or (is_bound and not hands_on):
            raise  # a bug inside of the environment
        raise ConfigError([f"environment.options: {name}: {mistake}"]) from error


def _mistake_in(options: dict[str, Any], said: str) -> str:
    """What Python says of arguments, in the words of whoever wrote the options; empty where it is not about them."""
    if (unknown := re.search(r"unexpected keyword argument '(\w+)'", said)) and unknown[1] in options:
        return f"got '{unknown[1]}', expected options that it has"
    if missing := re.search(r"missing (?:\d+|a) required (?:keyword-only )?arguments?: (.+)", said):
        return f"got no {missing[1]}, expected it"
    return "got 'seed', expected run.seed to set it" if "seed" in options else ""
