"""A rank other than 0 as it is seen from outside: its watchdog and its side port. The learner's speaker is rank 0."""

import os

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily

from common.config.schema import Config
from common.metrics import Reading
from common.side_port import SidePort
from common.watchdog import Watchdog


class Guest:
    """Opened when the ranks have met."""

    def __init__(self, config: Config, rank: int, *, limit_s: float) -> None:
        """`limit_s`: longest time between two meetings; longer than a rank waits for another, as that says more."""
        self._watchdog = Watchdog(is_heard=False)
        self._watch = self._watchdog.watch(f"rank {rank} of the learner", limit_s=limit_s)
        self._rank = rank
        self.step: int | None = None
        """Optimizer steps completed when its newest one began; None before its first."""
        registry, learner = CollectorRegistry(), config.learner
        registry.register(step_of(self))
        port = learner.metrics_port and learner.metrics_port + int(os.environ["LOCAL_RANK"])
        self._side_port = SidePort(
            registry, component="rank", health=self._watchdog.verdict, readiness=self._why_not_ready,
            host=learner.metrics_host, port=port, key="learner.metrics_port",
        )  # fmt: skip

    def meet(self) -> None:
        """It has heard from the other ranks."""
        self._watch.beat()

    def begin(self, step: int) -> None:
        """It takes part in the step that follows `step` completed ones."""
        self.step = step

    def _why_not_ready(self) -> str:
        return "" if self.step is not None else f"rank {self._rank} has joined, and waits for its first step"

    def close(self) -> None:
        self._side_port.close()
        self._watch.rest()


def step_of(guest: Guest) -> Reading:
    text = "Optimizer steps completed, as a rank other than 0 knows."
    return Reading(GaugeMetricFamily, "chord_rank_step", text, lambda: guest.step)
