"""The watchdog: ends a process one of whose loops is stuck, loudly, and tells the supervisor while all of them move.

A loop registers a watch and beats it with real progress. Once a watch is overdue, the stacks of all threads and one
line are written, and the process ends with exit code 1, so that its supervisor starts it again. While every watch is in
time, the supervisor hears so in systemd's notification protocol (datagrams to $NOTIFY_SOCKET, where that is set).
"""

import faulthandler
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

from common.errors import COMPONENT_FAILURE

log = logging.getLogger(__name__)

NOTIFY_SOCKET = "NOTIFY_SOCKET"
TICK_S = 0.5
MAX_TICK_S = 2.0
"""A longer tick was not lived through: the process was stopped, its machine suspended, or its interpreter held up."""
STARTS_AND_STOPS_S = 60
"""While a component starts or stops, its supervisor is asked for so much more time with every sign of life."""
LAST_WORDS_S = 10.0
"""Longest time for the stacks and the line; the process ends even where writing them hangs."""


class WakingClock:
    """Seconds that this process was awake for: a tick counts as MAX_TICK_S at most. Only one thread may call `tick`."""

    def __init__(self) -> None:
        self._ticked = 0.0, time.monotonic()
        """Seconds and the time of the last tick; replaced as a whole, so that no thread sees half of it."""

    @property
    def now_s(self) -> float:
        """The time now; for any thread."""
        now_s, at = self._ticked
        return now_s + min(time.monotonic() - at, MAX_TICK_S)

    def tick(self) -> float:
        """The time now; to be called more often than every MAX_TICK_S."""
        (now_s, at), now = self._ticked, time.monotonic()
        self._ticked = now_s + min(now - at, MAX_TICK_S), now
        return self._ticked[0]


class Notifier:
    """The way to a supervisor; without $NOTIFY_SOCKET it leads nowhere."""

    def __init__(self, *, is_heard: bool) -> None:
        address = os.environ.pop(NOTIFY_SOCKET, "")  # a child process must not speak for this one
        address = address if is_heard else ""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.setblocking(False)

    def send(self, *lines: str) -> None:
        """Never waits: a supervisor that does not read, or is gone, loses the news."""
        if self._address:
            try:
                self._socket.sendto("\n".join(lines).encode(), self._address)
            except OSError as error:
                log.debug("the supervisor was not reached: %s", error)

    def close(self) -> None:
        self._socket.close()


@dataclass(frozen=True)
class Beat:
    """When a loop last moved, what it does since, and how long that may take. Replaced as a whole, so that the
    watchdog's thread never sees half of it."""

    at_s: float
    phase: str
    limit_s: float


class Watch:
    """One loop's. `beat`, `enter` and `phase` may be called by any thread."""

    def __init__(self, clock: WakingClock, name: str, *, limit_s: float) -> None:
        """`name`: who has not moved, as in "the learner's inbox"; `limit_s`: between two beats outside a phase."""
        self.name = name
        self._clock = clock
        self.last = Beat(clock.now_s, "", limit_s)

    def beat(self) -> None:
        """The loop has moved."""
        self.last = Beat(self._clock.now_s, self.last.phase, self.last.limit_s)

    def enter(self, phase: str, *, limit_s: float) -> None:
        """The loop has moved, and does `phase` from now on, with its own longest time between two beats."""
        self.last = Beat(self._clock.now_s, phase, limit_s)

    def rest(self) -> None:
        """The loop has ended: nothing is expected of it any more."""
        self.enter("", limit_s=math.inf)

    @contextmanager
    def phase(self, phase: str, *, limit_s: float) -> Generator[None]:
        """`enter` for a while; afterwards the loop is where it was before."""
        before = self.last
        self.enter(phase, limit_s=limit_s)
        try:
            yield
        finally:
            self.enter(before.phase, limit_s=before.limit_s)

    def verdict(self) -> str:
        """A line where the watch is overdue, else nothing."""
        last = self.last
        stood_s = self._clock.now_s - last.at_s
        if stood_s <= last.limit_s:
            return ""
        where = f' in phase "{last.phase}"' if last.phase else ""
        return (
            f"{self.name} has not moved for {stood_s:.0f} s{where}, expected at most {last.limit_s:.0f} s: "
            "ending, so that a supervisor starts it again"
        )


class Watchdog:
    """A thread and the watches that it looks at, from construction on."""

    def __init__(self, *, is_heard: bool = True) -> None:
        """Not heard by the supervisor where another process speaks for the component."""
        self._clock = WakingClock()
        self._watches: list[Watch] = []
        self._notifier = Notifier(is_heard=is_heard)
        self._is_ready = False
        self._is_stopping = False
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._guard, name="watchdog", daemon=True)
        self._thread.start()

    def watch(self, name: str, *, limit_s: float) -> Watch:
        """Watch one more loop, from now on."""
        watch = Watch(self._clock, name, limit_s=limit_s)
        self._watches.append(watch)
        return watch

    def verdict(self) -> str:
        """The line of a watch that is overdue now; nothing while all of them are in time. For any thread."""
        return next((line for watch in tuple(self._watches) if (line := watch.verdict())), "")

    def ready(self) -> None:
        """The component does now what it is there for; later calls say nothing new."""
        if not self._is_ready:
            self._is_ready = True
            self._notifier.send("READY=1")

    def stopping(self) -> None:
        """The component has begun to end, which is watched like the rest; later calls say nothing new."""
        if not self._is_stopping:
            self._is_stopping = True
            self._notifier.send("STOPPING=1")

    def close(self) -> None:
        """Watch no longer: the process ends."""
        self.stopping()
        self._is_closing.set()
        self._thread.join(timeout=5)
        self._notifier.close()

    def _guard(self) -> None:
        told_s = -1.0
        while not self._is_closing.wait(TICK_S):
            now_s = self._clock.tick()
            if line := self.verdict():
                _end(line)
            if now_s - told_s >= 1.0:
                told_s = now_s
                self._notifier.send("WATCHDOG=1", f"STATUS={self._status()}", *self._plea())

    def _plea(self) -> list[str]:
        """Nobody knows how long a model loads or a step ends; the watches know how long it may take."""
        is_between = self._is_stopping or not self._is_ready
        return [f"EXTEND_TIMEOUT_USEC={STARTS_AND_STOPS_S * 1_000_000}"] if is_between else []

    def _status(self) -> str:
        return ", ".join(phase for watch in tuple(self._watches) if (phase := watch.last.phase))


def _end(line: str) -> None:
    faulthandler.dump_traceback_later(LAST_WORDS_S, exit=True)
    faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    log.critical("%s", line)
    os._exit(COMPONENT_FAILURE)
