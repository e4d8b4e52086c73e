"""The simulated engine: seeded tokens and log-probs at a set speed, no model; for load, chaos and scale tests."""

import asyncio
import secrets
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actors.engine import Answer, FinishReason, Pressure, SamplingParameters, check_prompt
from common.config.schema import Actor
from common.version import Version
from common.wait import wait_for
from common.weights.snapshot import Snapshot

TICK_S = 0.05
"""Longest time between two looks at how many tokens are due."""


class SimulatedEngine:
    """Shares `actor.tokens_per_s` evenly among the running answers; prompt and seed alone decide what one holds."""

    name = "simulated"

    def __init__(self, *, actor: Actor, vocab_size: int, end_tokens: frozenset[int]) -> None:
        self._actor = actor
        self._vocab_size = vocab_size
        self._end_tokens = sorted(end_tokens)
        self._version: Version | None = None
        self._num_running = 0
        self._load_turn = asyncio.Lock()
        self._is_open = asyncio.Event()
        """Clear while a load waits for running answers to end: new ones wait."""
        self._is_open.set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    @property
    def version(self) -> Version | None:
        return self._version

    @property
    def num_running(self) -> int:
        return self._num_running

    @property
    def pressure(self) -> Pressure:
        """It has no KV cache, and room for all."""
        return Pressure()

    async def start(self) -> None: ...

    async def load(self, snapshot: Snapshot, *, in_flight: bool = True) -> None:
        async with self._load_turn:
            snapshot.path.stat()  # raises where there is no file
            if not in_flight:
                self._is_open.clear()
                try:
                    await wait_for(
                        self._is_idle.wait(), f"the end of running answers ({snapshot.version})",
                        whom="the simulated engine", limit_s=self._actor.load_timeout_s,
                    )  # fmt: skip
                finally:
                    self._is_open.set()
            self._version = snapshot.version

    async def sample(self, prompt: Sequence[int], sampling: SamplingParameters) -> Answer:
        check_prompt(prompt, vocab_size=self._vocab_size, max_model_tokens=self._actor.max_model_tokens)
        await self._is_open.wait()
        self._num_running += 1
        self._is_idle.clear()
        try:
            num_tokens = min(sampling.max_tokens, self._actor.max_model_tokens - len(prompt))
            tokens, logprobs, finish = self._imagine(prompt, num_tokens, sampling.seed)
            return Answer(tokens, logprobs, await self._produce(len(tokens)), finish)
        finally:
            self._num_running -= 1
            if self._num_running == 0:
                self._is_idle.set()

    def _imagine(
        self, prompt: Sequence[int], max_tokens: int, seed: int | None
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], FinishReason]:
        random = np.random.default_rng([secrets.randbits(32) if seed is None else seed, *prompt])
        num_tokens = int(random.integers(1, max_tokens + 1))
        ordinary = np.setdiff1d(np.arange(self._vocab_size, dtype=np.int32), self._end_tokens)
        tokens = random.choice(ordinary, size=num_tokens)
        logprobs = -random.exponential(size=num_tokens).astype(np.float32)
        if num_tokens == max_tokens or not self._end_tokens:
            return tokens, logprobs, FinishReason.LENGTH
        tokens[-1] = self._end_tokens[0]
        return tokens, logprobs, FinishReason.STOP

    async def _produce(self, num_tokens: int) -> NDArray[np.int32]:
        """Wait until `num_tokens` tokens are due; the versions that were loaded as each came."""
        versions: list[int] = []
        num_due, looked_at = 0.0, time.monotonic()
        while len(versions) < num_tokens:
            tokens_per_s = self._actor.tokens_per_s / self._num_running
            await asyncio.sleep(min(TICK_S, (num_tokens - num_due) / tokens_per_s))
            now = time.monotonic()
            num_due, looked_at = num_due + (now - looked_at) * tokens_per_s, now
            if self._version is None:
                raise RuntimeError("simulated: no weights are loaded")
            versions += [self._version.step] * (min(int(num_due), num_tokens) - len(versions))
        return np.asarray(versions, dtype=np.int32)

    async def probe(self) -> None:
        await asyncio.sleep(TICK_S)

    async def close(self) -> None: ...
