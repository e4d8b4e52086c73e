"""The guard of an engine: starts it in time, probes it, counts its failures, and says when it is beyond help.

A request failure is one answer that the engine could not give: the lease goes back, the actor goes on. A probe failure
is a health check without a reply in time. Several in a row of either kind, or a dead engine, end the actor with a line.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter

from actors.engine import Answer, Engine, EngineDead, SamplingParameters
from common.config.schema import Actor
from common.errors import ComponentFailure, OperatorError
from common.wait import wait_for

log = logging.getLogger(__name__)

PROBE_EVERY_S = 5.0
MAX_FAILURES_IN_A_ROW = 3
"""Of either kind."""


class SamplingFailed(Exception):
    """The engine could not answer; it is the engine's fault, not the prompt's. Begins with "engine:"."""


class EngineGuard:
    """One engine's. Rollouts sample through it."""

    def __init__(self, engine: Engine, limits: Actor, registry: CollectorRegistry) -> None:
        self._engine = engine
        self._limits = limits
        self.is_started = False
        self.num_request_failures = self.num_probe_failures = 0
        """Since the start of the process."""
        self._requests_in_a_row = self._probes_in_a_row = 0
        self._last_failure = 0.0
        self._is_beyond_help = asyncio.Event()
        self._reason = ""
        self._request_failures = Counter(
            "chord_actor_request_failures_total", "Answers that the engine could not give.", registry=registry
        )
        self._probe_failures = Counter(
            "chord_actor_probe_failures_total", "Health checks that the engine failed.", registry=registry
        )

    @property
    def _whom(self) -> str:
        return f"the {self._engine.name} engine"

    async def start(self) -> None:
        """Start the engine. Raises WaitTimeout where that takes too long, ComponentFailure where it fails."""
        try:
            await wait_for(self._engine.start(), "its start", whom=self._whom, limit_s=self._limits.start_timeout_s)
        except (OperatorError, ComponentFailure):
            raise
        except Exception as error:
            raise ComponentFailure(f"{self._whom} did not start: {describe(error)}") from error
        self.is_started = True

    async def sample(self, prompt: Sequence[int], sampling: SamplingParameters) -> Answer:
        """One answer. Raises SamplingFailed where the engine gives none, ValueError where the prompt does not fit."""
        began = time.monotonic()
        try:
            answer = await wait_for(
                self._engine.sample(prompt, sampling), "an answer", whom=self._whom,
                limit_s=self._limits.answer_timeout_s, is_quiet=True,
            )  # fmt: skip
        except ValueError:
            raise
        except Exception as error:
            self._note_request_failure(error, began)
            raise SamplingFailed(f"engine: {self._engine.name}: {describe(error)}") from error
        self._requests_in_a_row = 0
        return answer

    async def watch(self) -> None:
        """Probe the engine until cancelled. Raises ComponentFailure, in one line, once it is beyond help."""
        while not self._is_beyond_help.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_EVERY_S):
                    await self._is_beyond_help.wait()
            if not self._is_beyond_help.is_set():
                await self._probe()
        raise ComponentFailure(
            f"{self._whom} is beyond help: {self._reason} (request failures {self.num_request_failures}, "
            f"probe failures {self.num_probe_failures}): ending, so that a supervisor starts this process again"
        )

    async def _probe(self) -> None:
        try:
            async with asyncio.timeout(self._limits.probe_timeout_s):
                await self._engine.probe()
        except Exception as error:
            self.num_probe_failures += 1
            self._probe_failures.inc()
            self._probes_in_a_row += 1
            reason = f"waited {self._limits.probe_timeout_s:.0f} s for the reply to a probe"
            reason = reason if isinstance(error, TimeoutError) else describe(error)
            log.warning("probe failure %d in a row of %s: %s", self._probes_in_a_row, self._whom, reason)
            self._judge(error, self._probes_in_a_row, f"probe: {reason}")
        else:
            self._probes_in_a_row = 0

    def _note_request_failure(self, error: Exception, began: float) -> None:
        self.num_request_failures += 1
        self._request_failures.inc()
        if began > self._last_failure:  # answers that were under way together fail together: that counts once
            self._requests_in_a_row += 1
            self._last_failure = time.monotonic()
        log.warning("request failure %d in a row of %s: %s", self._requests_in_a_row, self._whom, describe(error))
        self._judge(error, self._requests_in_a_row, f"request: {describe(error)}")

    def _judge(self, error: Exception, num_in_a_row: int, reason: str) -> None:
        if isinstance(error, EngineDead):
            self._reason = self._reason or str(error)
            self._is_beyond_help.set()
        elif num_in_a_row >= MAX_FAILURES_IN_A_ROW:
            self._reason = self._reason or f"{num_in_a_row} failures in a row, last {reason}"
            self._is_beyond_help.set()


def describe(error: BaseException) -> str:
    """In one line, bounded."""
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
