"""The idle clock of an actor: how long it had no group to sample or to score."""

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager


class IdleClock:
    """Runs from `start`, with the first weights, whenever nothing is under way.

    A group that was sampled and scored and waits for its receipt is not under way, so that a learner which is slow to
    acknowledge shows; one that is held up by a load of weights is.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._idle_s = 0.0
        self._since: float | None = None
        """Since when it runs; None while it does not."""
        self._has_started = False
        self._num_busy = 0

    @property
    def idle_s(self) -> float:
        return self._idle_s + (self._clock() - self._since if self._since is not None else 0.0)

    def start(self) -> None:
        """There are weights to sample with; calls after the first do nothing."""
        if not self._has_started:
            self._has_started = True
            self._run()

    @contextmanager
    def busy(self) -> Generator[None]:
        """Something is under way meanwhile."""
        self._idle_s, self._since = self.idle_s, None
        self._num_busy += 1
        try:
            yield
        finally:
            self._num_busy -= 1
            self._run()

    def _run(self) -> None:
        if self._has_started and self._num_busy == 0:
            self._since = self._clock()
