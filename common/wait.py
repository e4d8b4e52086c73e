"""A wait with a time limit, which says whom it waits for and in which phase."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from common.errors import WaitTimeout

log = logging.getLogger(__name__)

Result = TypeVar("Result")

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

    def count_from(self, moment_s: float) -> None:
        """The limit counts from a moment of the monotonic clock, past or to come."""
        self._since = moment_s

    def check(self, phase: str | Callable[[], str]) -> None:
        """Log `waiting 12 s for PHASE from WHOM` now and then, where a PHASE that takes time to say is asked for only
        then. Raises WaitTimeout past the limit."""
        now = time.monotonic()
        is_over = now - self._since > self._limit_s
        if not is_over and now - self._reported <= REPORT_S:
            return
        what = f"{now - self._since:.0f} s for {phase if isinstance(phase, str) else phase()} from {self._whom}"
        if is_over:
            raise WaitTimeout(f"waited {what}, expected it within {self._limit_s:.0f} s")
        log.warning("waiting %s", what)
        self._reported = now


async def wait_for(
    awaited: Awaitable[Result], phase: str, *, whom: str, limit_s: float, is_quiet: bool = False,
    since: Callable[[], float] | None = None,
) -> Result:  # fmt: skip
    """What `awaited` gives; it is cancelled where it takes longer. Raises WaitTimeout naming `whom` and `phase`.

    `is_quiet`: one of many waits that may well last; only the end of its patience is told.
    `since`: the moment of the monotonic clock from which the limit counts, where that is later than the call; asked for
    again and again.
    """
    called_s, wait = time.monotonic(), Wait(whom, limit_s=limit_s)
    task = asyncio.ensure_future(awaited)
    try:
        while not (await asyncio.wait([task], timeout=min(1.0, limit_s)))[0]:
            if since:
                wait.count_from(max(called_s, since()))
            if not is_quiet or wait.waited_s > limit_s:
                wait.check(phase)
        return task.result()
    finally:
        task.cancel()
