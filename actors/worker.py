"""The actor: asks for leases, runs their groups side by side, sends them until they are acknowledged, and follows the
weights.

Work loop: consumes leases; waits for room, new weights or the next second; produces group tasks. Each group task:
consumes answers; waits for its receipt. Beside them the engine is started and watched, and kept on the newest weights.
Everything ends with `drain`, with the run, or with an engine that is beyond help.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from actors.concurrency import Concurrency
from actors.fitter import Fitter
from actors.guard import SamplingFailed, describe
from actors.idle_clock import IdleClock
from actors.link import LearnerLink
from actors.metrics import ActorMetrics, Report
from actors.standing import Standing
from actors.start import Parts, cancel_all, raise_one_line, say_goodbye
from common.config.schema import Actor
from common.trajectory import TrajectoryGroup
from common.wire.codec import Buffer
from common.wire.groups import group_frames, group_header
from common.wire.messages import (
    ActorState,
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


class Worker:
    """One actor's conductor; link and engine are closed by the caller."""

    def __init__(
        self,
        parts: Parts,
        link: LearnerLink,
        fitter: Fitter,
        metrics: ActorMetrics,
        limits: Actor,
        *,
        show: Callable[[ActorState, str], None] = lambda *_: None,
    ) -> None:
        """`show` is called with the state and a detail each time that the work loop comes round."""
        self._parts = parts
        self._engine = parts.engine
        self._link = link
        self._fitter = fitter
        self._metrics = metrics
        self._limits = limits
        self._show = show
        self._groups: dict[str, asyncio.Task[None]] = {}
        self._sampled_tokens = 0
        self._idle = IdleClock()
        self._concurrency = Concurrency(limits.max_groups_in_flight)
        self._wake = asyncio.Event()
        self._failure: BaseException | None = None
        self._drain = asyncio.Event()
        self._standing = Standing(parts.engine, parts.guard, link)

    def wake(self) -> None:
        """Ask for work now: there is room, or the weights are new."""
        self._wake.set()

    def note_load(self) -> None:
        """The engine has another version."""
        self._metrics.count_version(fetch_s=self._fitter.fetch_s, load_s=self._fitter.load_s)
        self.wake()

    def drain(self) -> None:
        """Take no more leases, end running groups and leave. Called again: give them back and leave."""
        if self._drain.is_set():
            for task in self._groups.values():
                task.cancel()
        self._drain.set()
        self.wake()

    async def run(self) -> str:
        """Work until the run is over or `drain`; returns why it ended. Raises OperatorError on the learner's final
        word, ComponentFailure where a part fails."""
        tasks = [
            asyncio.create_task(self._ask_for_work(), name="work"),
            asyncio.create_task(self._tend_engine(), name="engine"),
            asyncio.create_task(self._drain_when_asked(), name="drain"),
        ]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancel_all([*tasks, *self._groups.values()])
        failure = next((error for task in ended if (error := task.exception())), None)
        reason = str(failure or next(task.result() for task in ended))
        await say_goodbye(self._link, reason)
        if failure:
            raise_one_line(failure)
        return reason

    async def _tend_engine(self) -> None:
        """Start the engine; then watch it and keep it on the newest weights."""
        await self._parts.guard.start()
        self.wake()
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._parts.guard.watch())
                tasks.create_task(self._fitter.follow())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _drain_when_asked(self) -> str:
        """Wait for `drain`, then for the groups that run, `drain_s` at most."""
        await self._drain.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._limits.drain_s):
                while self._groups:
                    await asyncio.wait(self._groups.values())
        if self._groups:
            log.warning(
                "drained for %.0f s, actor.drain_s: giving back %s unfinished", self._limits.drain_s, [*self._groups]
            )
        return "asked to stop"

    async def _ask_for_work(self) -> str:
        while True:
            self._wake.clear()
            self._observe()
            request = self._request()
            work = await self._link.ask(request, Work, phase="work")
            if self._concurrency.note_leases(asked=request.capacity, granted=len(work.leases)):
                self.wake()
            self._fitter.want(work.newest)
            self._standing.compare(work.newest)
            for lease in work.leases:
                self._begin(lease)
            if work.is_finished:
                return "the run is over"
            with suppress(TimeoutError):
                async with asyncio.timeout(REPORT_S):
                    await self._wake.wait()
            if self._failure:
                raise self._failure

    def _request(self) -> WorkRequest:
        has_room = self._parts.guard.is_started and not self._drain.is_set()
        return WorkRequest(
            state=self.state, serving=self._standing.serving, held=tuple(self._groups),
            capacity=max(self._concurrency.limit - len(self._groups), 0) if has_room else 0,
            sampled_tokens=self._sampled_tokens, idle_s=self._idle.idle_s,
        )  # fmt: skip

    @property
    def state(self) -> ActorState:
        return ActorState.DRAINING if self._drain.is_set() else self._standing.state

    def why_not_ready(self, *, max_lag: int) -> str:
        """A line where a group sampled now would come too late or not count; empty where it would be welcome, whether
        or not the learner has a lease to give just now."""
        if self.state is not ActorState.SERVING:
            return f"the actor is {self.state}: {self._describe()}"
        if (lag := self._standing.lag) > max_lag:
            return f"the actor's weights are {lag} versions behind, expected at most {max_lag}: {self._describe()}"
        return ""

    def _describe(self) -> str:
        version = self._engine.version
        return f"{version if version else 'no version yet'}, {len(self._groups)} groups in flight"

    def _begin(self, lease: Lease) -> None:
        if self._drain.is_set() or lease.lease_id in self._groups:
            return
        task = asyncio.create_task(self._run_group(lease), name=f"group {lease.lease_id}")
        self._groups[lease.lease_id] = task
        task.add_done_callback(lambda done: self._end(lease.lease_id, done))

    def _end(self, lease_id: str, done: "asyncio.Task[None]") -> None:
        del self._groups[lease_id]
        if not done.cancelled() and (error := done.exception()):
            self._failure = error
        self.wake()

    async def _run_group(self, lease: Lease) -> None:
        reason = ""
        try:
            with self._idle.busy():
                group = await self._parts.rollout.group(lease)
            self._concurrency.note_end(self._engine.pressure, num_groups=len(self._groups))
            message = group_header(group), group_frames(group)
        except* SamplingFailed as failures:
            reason = str(failures.exceptions[0])
        except* Exception as failures:
            reason = reason or describe(failures.exceptions[0])
        else:
            await self._send_group(group, *message)
        if reason:
            await self._report_failure(lease, reason[:500])

    async def _send_group(self, group: TrajectoryGroup, header: GroupHeader, frames: list[Buffer]) -> None:
        num_tokens = sum(trajectory.num_answer_tokens for trajectory in group.trajectories)
        self._sampled_tokens += num_tokens
        receipt = await self._link.ask(header, Receipt, frames, phase=f"the receipt of lease {header.lease_id}")
        self._metrics.count_group(receipt.outcome, num_tokens=num_tokens, sampling_s=header.sampling_s)
        level = logging.DEBUG if receipt.outcome is Outcome.COMMITTED else logging.WARNING
        log.log(level, "lease %s: %s %s", header.lease_id, receipt.outcome, receipt.reason)

    async def _report_failure(self, lease: Lease, reason: str) -> None:
        log.warning("lease %s failed: %s", lease.lease_id, reason)
        self._metrics.count_failure()
        await self._link.ask(
            LeaseFailure(lease_id=lease.lease_id, reason=reason), Receipt, phase="the receipt of a failure"
        )

    def _observe(self) -> None:
        """Keep the clock, the pulse and the metrics up to date."""
        version = self._engine.version
        if version:
            self._idle.start()
        self._show(self.state, self._describe())
        self._metrics.observe(
            Report(
                self.state, version.step if version else -1, self._standing.lag, len(self._groups),
                self._engine.num_running, self._concurrency.limit, self._engine.pressure, self._idle.idle_s,
                self._fitter.received_bytes,
            )
        )  # fmt: skip
