"""The pulse of an actor or evaluator: that its event loop goes round, and its state, for watchdog and supervisor."""

import asyncio

from common.config.schema import Config
from common.watchdog import Watchdog
from common.wire.messages import ActorState

BEAT_S = 1.0
READY_IN = {
    "actor": {ActorState.SERVING},
    "evaluator": {ActorState.FITTING, ActorState.SERVING, ActorState.STALE},  # for hours no version may be owed a score
}
"""States in which a peer does what it is there for."""


class Pulse:
    """Begins as soon as it is made; `keep` runs beside the peer's work."""

    def __init__(self, config: Config, component: str) -> None:
        self._ready_in = READY_IN[component]
        self._limit_s = config.run.watchdog_s
        self._learner_s = config.network.learner_timeout_s
        self._watchdog = Watchdog()
        start_s = config.actor.start_timeout_s
        self._loop = self._watchdog.watch(f"the {component}'s event loop", limit_s=self._limit_s)
        self._loop.enter("loading libraries and environment", limit_s=start_s)
        self._work = self._watchdog.watch(f"the {component}'s work loop", limit_s=start_s)

    async def keep(self) -> None:
        """Beat until cancelled."""
        while True:
            self._loop.enter("", limit_s=self._limit_s)
            await asyncio.sleep(BEAT_S)

    def show(self, state: ActorState, detail: str) -> None:
        """The work loop has come round in `state`; its next wait for the learner ends by itself, or is overdue."""
        self._work.enter(f"{state}, {detail}", limit_s=self._learner_s + self._limit_s)
        if state in self._ready_in:
            self._watchdog.ready()
        if state is ActorState.DRAINING:
            self._watchdog.stopping()

    def verdict(self) -> str:
        """A line where a loop is overdue, else nothing."""
        return self._watchdog.verdict()

    def leave(self) -> None:
        """All that is left is to close things, which must not take long."""
        self._watchdog.stopping()
        self._work.enter("leaving", limit_s=self._limit_s)
