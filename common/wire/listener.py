"""A listening socket and its guard: who may connect, how many, how much each may send, and who is shown out.

Consumes connections and messages of strangers; its own thread watches libzmq's reports and the bytes that come in, and
waits for nobody. Socket and `receive`, `send`, `poll` belong to the thread that uses them; the rest may be called from
any.
"""

import logging
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq

from common.keys.allowed import ServerKeys
from common.keys.pool import PoolKeys
from common.watchdog import Watch
from common.wire.codec import MAX_FRAMES, Buffer
from common.wire.connections import FRAME_BYTES, Bounds, Closing, Connection, Connections
from common.wire.sockets import SocketLimits, bind, open_socket

log = logging.getLogger(__name__)

EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_MONITOR_STOPPED
MAX_PARTS = MAX_FRAMES + 1
"""Frames of a message with its routing id."""
WATCH_S, MAX_WATCH_S = 0.05, 0.2
"""Between two looks at every connection; what a flood brings within it, and within a look, is not noticed before."""
LOOK_SHARE = 0.02
"""Of the guard's time, within those limits: a look takes 2 ms for a thousand connections."""
SAY_S = 5.0
"""At most one line in the log per reason and this time, whatever arrives."""


@dataclass(frozen=True)
class Arrival:
    """A message and where it came from."""

    routing_id: bytes
    """Empty on sockets that do not route."""
    frames: Sequence[Buffer]
    connection: Connection
    key_name: str | None
    """The name that the sender's key is allowed under; None without keys."""
    num_bytes: int


class Listener:
    """One bound socket. With `keys` it is a CURVE server, and nobody gets further than its handshake without one."""

    def __init__(
        self, context: "zmq.Context[Any]", kind: int, *, host: str, port: int, purpose: str, limits: SocketLimits,
        bounds: Bounds, keys: ServerKeys | PoolKeys | None = None, watch: Watch | None = None,
    ) -> None:  # fmt: skip
        """Raises OperatorError where the port is taken."""
        self._purpose = purpose
        self._guard_watch = watch
        self._keys = keys
        self._routes = kind == zmq.ROUTER
        self.socket = open_socket(context, kind, limits)
        if keys:
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.CURVE_SECRETKEY, keys.pair.secret)
        self._monitor = self._open_monitor(context)
        try:
            self.port = bind(self.socket, host, port, purpose)
        except BaseException:
            self.socket.disable_monitor()
            self._monitor.close()
            self.socket.close()
            raise
        self._connections = Connections(self.port, bounds)
        self.refusals: Counter[str] = Counter()
        """Refused messages by kind of fault."""
        self._ending = Closing.HANDSHAKE
        """Why the next newcomer to end ends: libzmq names the reason first, then the connection."""
        self._said: dict[str, tuple[float, int]] = {}
        self._thread = threading.Thread(target=self._watch, name=f"guard {purpose}", daemon=True)
        self._thread.start()

    @property
    def closings(self) -> "Counter[str]":
        """Closed connections by reason."""
        return self._connections.closings

    @property
    def num_connections(self) -> int:
        return len(self._connections)

    @property
    def is_full(self) -> bool:
        """Whether no further connection may be admitted."""
        return self._connections.is_full

    def poll(self, timeout_ms: int) -> bool:
        if self.socket.get(zmq.EVENTS) & zmq.POLLIN:  # a poll costs ten times as much
            return True
        return timeout_ms > 0 and bool(self.socket.poll(timeout_ms))

    def receive(self) -> Arrival | None:
        """The next message, which must be there; None where its sender has gone or its key was revoked."""
        parts = self._receive_parts()
        try:
            connection = self._connections.of(int(parts[-1].get(zmq.SRCFD)))
            key = str(parts[-1].get("User-Id")).encode() if self._keys else b""
        except zmq.ZMQError:  # of libzmq's own making: the end of a subscription whose subscriber has gone
            return None
        key_name = None
        if self._keys:
            connection.key = key
            key_name = self._keys.allowed.name_of(key)
            if key_name is None:
                self.expel(connection, Closing.REVOKED, "its key is no longer allowed")
                return None
        if len(parts) > MAX_PARTS:
            self.refuse("malformed", f"got more than {MAX_PARTS} frames")
            self.expel(connection, Closing.MALFORMED, "it sent what no peer sends")
            return None
        num_bytes = sum(len(part) + FRAME_BYTES for part in parts)
        routing_id = parts.pop(0).bytes if self._routes else b""
        return Arrival(routing_id, [part.buffer for part in parts], connection, key_name, num_bytes)

    def _receive_parts(self) -> list[Any]:
        """The frames of one message; where there are too many, MAX_PARTS + 1 of them, the last one last."""
        parts = list[Any]()
        while True:
            part = self.socket.recv(copy=False)
            if len(parts) > MAX_PARTS:
                parts.pop()
            parts.append(part)
            if not part.more:
                return parts

    def admit(self, connection: Connection) -> None:
        """It has said something sensible, so it is no longer among those who give way."""
        connection.is_admitted = True

    def settle(self, arrival: Arrival) -> None:
        """A message was handled: its bytes no longer count against its sender."""
        self._connections.credit(arrival.connection, arrival.num_bytes)

    def send(self, frames: Sequence[Buffer], **options: Any) -> Any:
        """Never waits. Raises zmq.ZMQError where the peer has gone or does not read."""
        return self.socket.send_multipart(frames, flags=zmq.NOBLOCK, **options)

    def refuse(self, fault: str, why: str) -> None:
        """Count a refused message."""
        self.refusals[fault] += 1
        self.say(fault, f"refused a message: {why}")

    def expel(self, connection: Connection, reason: Closing, why: str) -> None:
        """Close a connection."""
        if self._connections.close(connection, reason):
            self.say(reason, f"closed a connection{connection.origin}: {why}")

    def close(self) -> None:
        """Called by the thread that uses the socket."""
        if self.socket.closed:
            return
        self.socket.disable_monitor()  # while the guard still reads: libzmq waits for room for its last words
        self._thread.join(timeout=5)
        self.socket.close()
        self._connections.clear()

    def _open_monitor(self, context: "zmq.Context[Any]") -> Any:
        address = f"inproc://guard-{id(self)}"
        self.socket.monitor(address, EVENTS)
        monitor = context.socket(zmq.PAIR)
        monitor.setsockopt(zmq.LINGER, 0)
        monitor.connect(address)
        return monitor

    def _watch(self) -> None:
        """Until the monitor is disabled."""
        look_at, is_watching = 0.0, True
        with self._monitor, suppress(zmq.ContextTerminated):
            while is_watching:
                if self._guard_watch:
                    self._guard_watch.beat()
                if self._monitor.poll(int(WATCH_S * 1000)):
                    is_watching = self._hear_events(until=time.monotonic() + WATCH_S)
                if (began := time.monotonic()) > look_at:
                    self._look()
                    took_s = time.monotonic() - began
                    look_at = began + took_s + pause_after(took_s)

    def _hear_events(self, *, until: float) -> bool:
        """Take over what libzmq reports, for a bounded time; False at the end."""
        while time.monotonic() < until and self._monitor.poll(0):
            event, value = struct.unpack("=hi", self._monitor.recv_multipart()[0])
            if event == zmq.EVENT_MONITOR_STOPPED:
                return False
            if event == zmq.EVENT_ACCEPTED:
                self._connections.accept(value)
            elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self._ending = Closing.AUTHENTICATION
            else:
                self._end(value, self._ending)
                self._ending = Closing.HANDSHAKE
        return True

    def _end(self, descriptor: int, reason: Closing) -> None:
        connection = self._connections.end(descriptor, reason)
        if reason is Closing.AUTHENTICATION:
            origin = connection.origin if connection else ""
            self.say(reason, f"closed a connection{origin}: its key is not allowed (see chord-keys list)")

    def _look(self) -> None:
        for connection, reason in self._connections.inspect(self._is_allowed):
            if reason is Closing.REVOKED:
                self.say(reason, f"closed a connection{connection.origin}: its key is no longer allowed")
            else:
                limit = "max_unacknowledged_bytes" if connection.is_admitted else "a greeting"
                self.say(reason, f"closed a connection{connection.origin}: it sent more than {limit} without a pause")

    def _is_allowed(self, key: bytes) -> bool:
        return self._keys is None or self._keys.allowed.name_of(key) is not None

    def say(self, reason: str, line: str) -> None:
        """Log now and then: a flood must not fill the disk."""
        now = time.monotonic()
        said_at, num_unsaid = self._said.get(reason, (float("-inf"), 0))
        if now - said_at < SAY_S:
            self._said[reason] = said_at, num_unsaid + 1
            return
        also = f" ({num_unsaid} more like it before)" if num_unsaid else ""
        log.warning("%s: %s%s", self._purpose, line, also)
        self._said[reason] = now, 0


def pause_after(look_s: float) -> float:
    """Seconds to the next look, after one that took so long."""
    return min(max(look_s / LOOK_SHARE, WATCH_S), MAX_WATCH_S)
