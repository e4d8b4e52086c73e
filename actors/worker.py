"""The actor: asks for leases, runs their groups side by side, sends them until they are acknowledged, and follows the
weights.

Work loop: consumes leases; waits for room, new weights or the next second; produces group tasks. Each group task:
consumes answers; waits for its receipt. The fitter runs beside them. Everything ends with `drain`, or with the run.
"""

import asyncio
import logging
import time
from contextlib import suppress
from typing import NoReturn

from actors.engine import Engine
from actors.fitter import Fitter
from actors.link import LearnerLink
from actors.metrics import ActorMetrics
from actors.rollout import Rollout, SamplingFailed
from common.errors import ComponentFailure, OperatorError
from common.trajectory import TrajectoryGroup
from common.version import Version
from common.wire.codec import Buffer
from common.wire.groups import group_frames, group_header
from common.wire.messages import (
    ActorState,
    Goodbye,
    GroupHeader,
    Lease,
    LeaseFailure,
    Outcome,
    Receipt,
    Work,
    WorkRequest,
)

log = logging.getLogger(__name__)

REPORT_S = 1.0
"""Longest time between two work requests; they keep leases alive."""
DRAIN_S = 10.0
"""Longest time that running groups are given to end when the actor leaves."""


class Worker:
    """One actor's conductor; engine and link are started and closed by the caller."""

    def __init__(
        self,
        engine: Engine,
        rollout: Rollout,
        link: LearnerLink,
        fitter: Fitter,
        metrics: ActorMetrics,
        *,
        max_groups: int,
    ) -> None:
        self._engine = engine
        self._rollout = rollout
        self._link = link
        self._fitter = fitter
        self._metrics = metrics
        self._max_groups = max_groups
        self._groups: dict[str, asyncio.Task[None]] = {}
        self._sampled_tokens = 0
        self._idle_s = 0.0
        self._idle_since: float | None = None
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._asking: asyncio.Task[str] | None = None
        self.is_draining = False

    def wake(self) -> None:
        """Ask for work now: there is room, or the weights are new."""
        self._wake.set()

    def drain(self) -> None:
        """Take no more leases; `run` returns when the running groups have ended."""
        self.is_draining = True
        if self._asking:
            self._asking.cancel()

    async def run(self) -> str:
        """Work until the run is over or `drain`; returns the reason. Raises ComponentFailure where a part fails."""
        following = asyncio.create_task(self._fitter.follow(), name="fitter")
        self._asking = asyncio.create_task(self._ask_for_work(following), name="work")
        try:
            await asyncio.wait([self._asking])
            reason = "asked to stop" if self._asking.cancelled() else self._asking.result()
            self.is_draining = True
            if self._groups:
                await asyncio.wait(self._groups.values(), timeout=DRAIN_S)
            await self._say_goodbye(reason)
            return reason
        finally:
            tasks = [self._asking, following, *self._groups.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask_for_work(self, following: "asyncio.Task[None]") -> str:
        while True:
            self._wake.clear()
            work = await self._link.ask(self._request(), Work, phase="work")
            self._fitter.want(work.newest)
            for lease in work.leases:
                self._begin(lease)
            if work.is_finished:
                return "the run is over"
            self._count_idle_time()
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._wake.wait()
            if self._failure:
                raise_one_line(self._failure)
            if following.done():
                following.result()

    def _request(self) -> WorkRequest:
        return WorkRequest(
            state=self.state, capacity=max(self._max_groups - len(self._groups), 0), serving=self._serving(),
            held=tuple(self._groups), sampled_tokens=self._sampled_tokens, idle_s=self._idle_s,
        )  # fmt: skip

    def _serving(self) -> Version | None:
        """The engine's version, where it is one of the run that the learner leads now."""
        version, welcome = self._engine.version, self._link.welcome
        return version if version and welcome and version.run_id == welcome.run_id else None

    @property
    def state(self) -> ActorState:
        if self.is_draining:
            return ActorState.DRAINING
        if self._engine.version is None:
            return ActorState.FITTING
        return ActorState.SERVING if self._serving() else ActorState.STALE

    def _begin(self, lease: Lease) -> None:
        if lease.lease_id in self._groups:
            return
        self._count_idle_time()
        self._idle_since = None
        task = asyncio.create_task(self._run_group(lease), name=f"group {lease.lease_id}")
        self._groups[lease.lease_id] = task
        task.add_done_callback(lambda done: self._end(lease.lease_id, done))

    def _end(self, lease_id: str, done: "asyncio.Task[None]") -> None:
        del self._groups[lease_id]
        if not done.cancelled() and (error := done.exception()):
            self._failure = error
        if not self._groups:
            self._idle_since = time.monotonic()
        self.wake()

    async def _run_group(self, lease: Lease) -> None:
        try:
            group = await self._rollout.group(lease)
            header, frames = group_header(group), group_frames(group)
        except* SamplingFailed as failures:
            raise failures.exceptions[0] from None
        except* Exception as failures:
            await self._report_failure(lease, failures.exceptions[0])
        else:
            await self._send_group(group, header, frames)

    async def _send_group(self, group: TrajectoryGroup, header: GroupHeader, frames: list[Buffer]) -> None:
        num_tokens = sum(trajectory.num_answer_tokens for trajectory in group.trajectories)
        self._sampled_tokens += num_tokens
        receipt = await self._link.ask(header, Receipt, frames, phase=f"the receipt of lease {header.lease_id}")
        self._metrics.count_group(receipt.outcome, num_tokens=num_tokens)
        if receipt.outcome is not Outcome.COMMITTED:
            log.warning("lease %s: %s (%s)", header.lease_id, receipt.outcome, receipt.reason)

    async def _report_failure(self, lease: Lease, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"[:500]
        log.warning("lease %s failed: %s", lease.lease_id, reason)
        self._metrics.count_failure()
        await self._link.ask(
            LeaseFailure(lease_id=lease.lease_id, reason=reason), Receipt, phase="the receipt of a failure"
        )

    async def _say_goodbye(self, reason: str) -> None:
        """Best effort: a learner that has gone needs no goodbye."""
        with suppress(TimeoutError, OperatorError, ComponentFailure):
            async with asyncio.timeout(2.0):
                await self._link.ask(Goodbye(reason=reason), Receipt, phase="a goodbye")

    def _count_idle_time(self) -> None:
        now = time.monotonic()
        if self._groups or self._engine.version is None:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        else:
            self._idle_s += now - self._idle_since
            self._idle_since = now
        self._metrics.observe(self._engine.version, len(self._groups), self._idle_s, self._fitter)


def raise_one_line(failure: BaseException) -> NoReturn:
    """End the actor; what is neither the operator's nor a peer's fault is the engine's, and a new start may help."""
    if isinstance(failure, OperatorError | ComponentFailure):
        raise failure
    raise ComponentFailure(f"{failure}: the actor ends, so that it can be started again") from failure
