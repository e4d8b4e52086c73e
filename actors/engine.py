"""What an actor needs of an inference engine: sample answers, load weights in flight, say which version it serves."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from common.version import Version
from common.weights.snapshot import Snapshot

SEED_BYTES = 6
"""Seeds below 2^48: every engine takes them."""


class EngineDead(Exception):
    """The engine will never answer again; only a new start of the actor helps."""


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParameters:
    """How one answer is sampled. Filters are for evaluation: a lease has none, as the learner could not match them."""

    temperature: float
    """0 is greedy (evaluation only)."""
    max_tokens: int
    seed: int | None = None
    """Makes the answer repeatable where the engine can (transformers, simulated)."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that make up this share of probability; 1 is all of them."""
    top_k: int = 0
    """Sample from so many likeliest tokens, before top_p is applied; 0 is all of them."""

    def of_turn(self, turn: int) -> "SamplingParameters":
        """Of an episode's turn, from 0, whose seed is the episode's own. An engine begins its draws anew with each
        answer, so turns that had one seed would repeat the first one's."""
        if turn == 0 or self.seed is None:
            return self
        return replace(self, seed=seed_from(self.seed, "turn", turn))


def seed_from(*parts: int | str) -> int:
    """The same one for the same parts, and another for others."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=SEED_BYTES).digest()
    return int.from_bytes(digest)


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One sampled continuation of a prompt, T tokens, the end-of-turn token included where it was sampled."""

    tokens: NDArray[np.int32]
    """[T]"""
    logprobs: NDArray[np.float32]
    """[T] log-prob of each token under the distribution it was drawn from (temperature and filters applied)."""
    versions: NDArray[np.int32]
    """[T] policy version (optimizer step) that produced each token; never falls within one answer."""
    finish: FinishReason


def check_prompt(prompt: Sequence[int], *, vocab_size: int, max_model_tokens: int) -> None:
    """Refuse a prompt that would leave no room for an answer, or that would crash an engine."""
    if not 0 < len(prompt) < max_model_tokens:
        raise ValueError(
            f"prompt: got {len(prompt)} tokens, expected 1 to {max_model_tokens - 1} (actor.max_model_tokens - 1)"
        )
    if not 0 <= min(prompt) <= max(prompt) < vocab_size:
        raise ValueError(f"prompt: got token ids from {min(prompt)} to {max(prompt)}, expected 0 to {vocab_size - 1}")


@dataclass(frozen=True, slots=True)
class Pressure:
    """How full an engine is; what it cannot tell is 0."""

    kv_cache_frac: float = 0.0
    """Share of its KV cache that running answers take."""
    waiting_frac: float = 0.0
    """Share of the answers under way that wait for room in its batch or its KV cache."""
    num_preemptions: int = 0
    """Times since its start that an answer lost its keys and values to others, which must be computed again."""


class Engine(Protocol):
    """Samples many answers at once; `load` swaps weights while they run."""

    name: str
    """vllm, transformers or simulated."""

    @property
    def version(self) -> Version | None:
        """The version whose weights are loaded; None before the first load."""
        ...

    @property
    def num_running(self) -> int:
        """Answers under way."""
        ...

    @property
    def pressure(self) -> Pressure:
        """How full it was when it last looked, a step of decoding ago as a rule."""
        ...

    async def start(self) -> None:
        """Load the model, in threads or processes of its own. No answer may be sampled before the first `load`."""
        ...

    async def load(self, snapshot: Snapshot, *, in_flight: bool = True) -> None:
        """Swap the weights. In flight, running answers go on under the new version; else they end first.

        Returns when `version` is the snapshot's; raises and keeps the old version where loading fails. Raises
        WaitTimeout where a phase of it takes longer than actor.load_timeout_s.
        """
        ...

    async def sample(self, prompt: Sequence[int], sampling: SamplingParameters) -> Answer:
        """One answer to `prompt` (token ids). Call it concurrently: the engine batches.

        ValueError where the prompt does not fit; an answer ends where prompt and answer reach actor.max_model_tokens.
        EngineDead where there is no engine left to answer.
        """
        ...

    async def probe(self) -> None:
        """Return once the engine's own loop has come round, at most a step of decoding later; at once while it loads.

        Raises EngineDead where it never will.
        """
        ...

    async def close(self) -> None:
        """Stop sampling and free what `start` took; leaves no process behind. A start under way is left to itself."""
        ...
