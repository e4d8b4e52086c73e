"""The TCP connections of one listening socket: how many, how much each may have under way, and why one was closed.

libzmq bounds single frames and messages in a queue, but neither connections nor the bytes of a message that never ends,
and it closes nobody on request. So each accepted connection is held here by a descriptor of its own: the kernel tells
how many bytes it has brought, the receiver how many were handled, and shutting it down makes libzmq let go of it.
"""

import os
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

MAX_NEWCOMERS = 128
"""Connections that have not yet said anything sensible, or `max_connections` where that is more: a whole fleet may come
at once. One more, and the oldest of them gives way."""
NEWCOMER_BYTES = 64 << 10
"""What a newcomer may send before its first message is understood; a greeting takes a few hundred bytes."""
FRAME_BYTES = 64
"""Allowance for the framing and encryption of one frame."""
IDLE_BYTES_PER_S = 512
"""Allowance for heartbeats."""
TCPI_BYTES_RECEIVED = 128
"""Offset of tcpi_bytes_received in Linux's struct tcp_info."""


class Closing(StrEnum):
    """Why a connection was closed."""

    HANDSHAKE = "handshake"
    """It ended before it had said anything sensible: no ZeroMQ, no key, too slow, or just gone."""
    AUTHENTICATION = "authentication"
    """Its key is not allowed."""
    REVOKED = "revoked"
    """Its key is no longer allowed."""
    IDENTITY = "identity"
    """It spoke for a peer that its key does not speak for."""
    MALFORMED = "malformed"
    """It sent what no peer sends."""
    UNACKNOWLEDGED = "unacknowledged"
    """It sent more than may wait to be handled."""
    CROWDED = "crowded"
    """A newcomer that gave way to newer ones."""
    FULL = "full"
    """`max_connections` others were there."""
    STALLED = "stalled"
    """It asked for weights and did not take them."""


@dataclass(frozen=True)
class Bounds:
    """What one listening socket takes on."""

    max_connections: int = 256
    max_unacknowledged_bytes: int = 128 << 20
    """Of one connection: received, but not handled yet."""


@dataclass(eq=False)
class Connection:
    """One accepted connection, as seen from here."""

    socket: "socket.socket | None"
    """Our own descriptor of it; None where it was gone before it could be looked at."""
    host: str = ""
    """The peer's address, for as long as anybody speaks of the connection; empty where it was gone."""
    key: bytes = b""
    """Z85 of the peer's public key, known from its first message on."""
    is_admitted: bool = False
    """Whether it has said something sensible."""
    is_closed_by_us: bool = False
    accepted_at: float = field(default_factory=time.monotonic)
    handled_bytes: int = 0
    seen_bytes: int = 0
    looked_at: float = field(default_factory=time.monotonic)
    """When `seen_bytes` had been received."""

    @property
    def is_open(self) -> bool:
        return self.socket is not None and not self.is_closed_by_us

    @property
    def origin(self) -> str:
        """For a line of the log."""
        return f" from {self.host}" if self.host else ""

    def received_bytes(self) -> int:
        """What it has brought so far, as the kernel counts."""
        own = self.socket
        try:
            info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256) if own else b""
        except OSError:
            return 0
        return struct.unpack_from("=Q", info, TCPI_BYTES_RECEIVED)[0] if len(info) >= TCPI_BYTES_RECEIVED + 8 else 0

    def shut_down(self) -> None:
        """Its end is a reset: the kernel keeps nothing of it for later."""
        if self.socket:
            with suppress(OSError):  # the peer was faster
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.socket.shutdown(socket.SHUT_RDWR)

    def forget(self) -> None:
        if self.socket:
            self.socket.close()
            self.socket = None


class Connections:
    """By libzmq's descriptor. Safe between the thread that watches and the one that receives."""

    def __init__(self, port: int, bounds: Bounds) -> None:
        self._port = port
        self._bounds = bounds
        self._lock = threading.Lock()
        self._table: dict[int, Connection] = {}
        self.closings: Counter[str] = Counter()
        """Closed connections by reason; the peers' own orderly ends do not count."""

    def __len__(self) -> int:
        return len(self._table)

    @property
    def is_full(self) -> bool:
        """Whether no further connection may be admitted."""
        with self._lock:
            return sum(c.is_admitted and c.is_open for c in self._table.values()) >= self._bounds.max_connections

    def accept(self, descriptor: int) -> None:
        """libzmq has accepted a connection; the oldest newcomer gives way where there are too many."""
        with self._lock:
            self._note(descriptor)
            newcomers = [c for c in self._table.values() if c.is_open and not c.is_admitted]
        for oldest in newcomers[: max(len(newcomers) - max(MAX_NEWCOMERS, self._bounds.max_connections), 0)]:
            self.close(oldest, Closing.CROWDED)

    def _note(self, descriptor: int) -> Connection | None:
        fresh = _duplicate(descriptor, self._port)
        known = self._table.get(descriptor)
        if fresh and known and _address(fresh) == _address(known.socket):
            fresh.close()  # its first message was faster than the news of it
            return known
        if known:
            del self._table[descriptor]
            known.forget()
        if fresh is None:
            return None
        self._table[descriptor] = connection = Connection(fresh, _host(fresh))
        return connection

    def end(self, descriptor: int, reason: Closing = Closing.HANDSHAKE) -> Connection | None:
        """libzmq has let go of a connection; `reason` counts where it was still a newcomer."""
        with self._lock:
            connection = self._table.pop(descriptor, None)
            if connection:
                if not connection.is_admitted and not connection.is_closed_by_us:
                    self.closings[reason] += 1
                connection.forget()
            elif reason is not Closing.HANDSHAKE:  # gone before anybody had looked at it, but refused all the same
                self.closings[reason] += 1
            return connection

    def of(self, descriptor: int) -> Connection:
        """The connection that a message came by; one that is not open where it has ended meanwhile."""
        with self._lock:
            return self._table.get(descriptor) or self._note(descriptor) or Connection(None)

    def credit(self, connection: Connection, num_bytes: int) -> None:
        """These bytes of it were handled."""
        with self._lock:
            connection.handled_bytes += num_bytes

    def close(self, connection: Connection, reason: Closing) -> bool:
        """Shut it down and count; False where that was done before."""
        with self._lock:
            if connection.is_closed_by_us:
                return False
            connection.is_closed_by_us = True
            self.closings[reason] += 1
            connection.shut_down()
            return True

    def inspect(self, is_allowed: Callable[[bytes], bool]) -> list[tuple[Connection, Closing]]:
        """Close whoever has too much under way or a key that was revoked; returns them."""
        with self._lock:
            present = [c for c in self._table.values() if c.is_open]
        at_fault = [(c, fault) for c in present if (fault := self._fault(c, is_allowed))]
        return [(connection, fault) for connection, fault in at_fault if self.close(connection, fault)]

    def _fault(self, connection: Connection, is_allowed: Callable[[bytes], bool]) -> Closing | None:
        if connection.key and not is_allowed(connection.key):
            return Closing.REVOKED
        limit = self._bounds.max_unacknowledged_bytes if connection.is_admitted else NEWCOMER_BYTES
        return Closing.UNACKNOWLEDGED if self._unhandled_bytes(connection) > limit else None

    def _unhandled_bytes(self, connection: Connection) -> int:
        """Heartbeats aside, which come with no message: the allowance for them is not saved up."""
        received, now = connection.received_bytes(), time.monotonic()
        with self._lock:
            allowance = int(IDLE_BYTES_PER_S * (now - connection.looked_at)) + 1
            grown = received - connection.seen_bytes
            connection.handled_bytes = min(connection.handled_bytes + min(grown, allowance), received)
            connection.seen_bytes, connection.looked_at = received, now
            return received - connection.handled_bytes

    def clear(self) -> None:
        with self._lock:
            for connection in self._table.values():
                connection.forget()
            self._table.clear()


def _duplicate(descriptor: int, port: int) -> "socket.socket | None":
    """Our own handle of a connection to `port`; None where the descriptor is closed or something else by now."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None
    try:
        own = socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        return None
    try:
        if own.getsockname()[1] == port:
            own.getpeername()
            return own
    except (OSError, IndexError):
        pass
    own.close()
    return None


def _host(own: "socket.socket") -> str:
    try:
        return str(own.getpeername()[0])
    except OSError:
        return ""


def _address(some: "socket.socket | None") -> object:
    try:
        return some.getpeername() if some else None
    except OSError:
        return None
