"""A wait with a time limit, which says whom it waits for and in which phase."""

import logging
import time

from common.errors import WaitTimeout

log = logging.getLogger(__name__)

REPORT_S = 5.0
"""A wait that lasts says so this often."""


class Wait:
    """One side of a wait: call `progress` when something came, `check` while nothing does."""

    def __init__(self, whom: str, *, limit_s: float) -> None:
        """`limit_s`: longest time without progress."""
        self._whom = whom
        self._limit_s = limit_s
        self._since = self._reported = time.monotonic()

    @property
    def waited_s(self) -> float:
        """Time since the last progress."""
        return time.monotonic() - self._since

    def progress(self) -> None:
        """Something came: the limit counts from now."""
        self._since = self._reported = time.monotonic()

    def check(self, phase: str) -> None:
        """Log `waiting 12 s for PHASE from WHOM` now and then. Raises WaitTimeout past the limit."""
        now = time.monotonic()
        if now - self._since > self._limit_s:
            raise WaitTimeout(
                f"waited {now - self._since:.0f} s for {phase} from {self._whom}, expected it within "
                f"{self._limit_s:.0f} s"
            )
        if now - self._reported > REPORT_S:
            log.warning("waiting %.0f s for %s from %s", now - self._since, phase, self._whom)
            self._reported = now
