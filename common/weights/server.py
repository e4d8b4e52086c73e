"""The learner's side of the weight plane: announces the newest version on an XPUB socket, and answers requests for it
and for earlier ones that are still needed."""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import zmq

from common.keys.allowed import ServerKeys
from common.version import Version
from common.watchdog import Watch
from common.weights.chunk_server import MAX_REQUEST_BYTES, MAX_WAITING_BYTES, ChunkServer
from common.weights.deltas import Delta
from common.weights.fan_out import FanOut
from common.weights.snapshot import Snapshot
from common.wire.codec import encode
from common.wire.connections import Bounds, Closing
from common.wire.listener import Arrival, Listener
from common.wire.messages import Announcement
from common.wire.sockets import SocketLimits

GRACE_S = 10.0
"""An older version that was asked for within this time is kept, so that a fetch in progress can end."""
MAX_KEPT = 4
"""Versions kept for such fetches at most, the newest aside; pinned ones come on top."""


SUBSCRIBE, UNSUBSCRIBE = b"\x01", b"\x00"
"""To everything, which is all that there is."""


class WeightServer(ChunkServer):
    """Consumes snapshots from `publish` too; begins to answer at once."""

    def __init__(
        self, context: "zmq.Context[Any]", *, host: str, port: int, limits: SocketLimits, announcements_port: int = 0,
        max_connections: int = 256, relay_width: int = 0, keys: ServerKeys | None = None, watch: Watch | None = None,
        guard_watch: Callable[[str], Watch] | None = None,
    ) -> None:  # fmt: skip
        """`relay_width`: of peers that pass versions on, as many are served as each passes one on to; 0: all are."""
        limits = replace(limits, max_frame_bytes=MAX_REQUEST_BYTES)
        bounds = Bounds(max_connections, MAX_WAITING_BYTES)

        def listen(kind: int, port: int, purpose: str) -> Listener:
            return Listener(
                context,
                kind,
                host=host,
                port=port,
                purpose=purpose,
                limits=limits,
                bounds=bounds,
                keys=keys,
                watch=guard_watch(purpose) if guard_watch else None,
            )

        # XPUB hands subscriptions over, so that a subscriber's connection is known, and can be closed.
        self.announcements = listen(zmq.XPUB, announcements_port, "announcements")
        self.announcements.socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.announcements_port = self.announcements.port
        self._outbox, self._inlet = _make_pair(context)
        self.newest: Version | None = None
        fan_out = FanOut(relay_width) if relay_width else None
        super().__init__(listen(zmq.ROUTER, port, "weights"), fan_out=fan_out, watch=watch)
        self.start()

    def publish(self, snapshot: Snapshot, *, pin: bool, delta: Delta | None = None) -> None:
        """Offer a snapshot as the newest, with the delta that leads to it, and announce it. One thread at a time."""
        self.offer(snapshot, pin=pin, delta=delta)
        self.newest = snapshot.version
        self._retire_old()
        header = Announcement(version=snapshot.version).stamped(snapshot.version)
        with suppress(zmq.ZMQError):  # closed, or announcements faster than they can be sent: the next one will do
            self._outbox.send_multipart(encode(header), flags=zmq.NOBLOCK)

    def close(self) -> None:
        super().close()
        self._outbox.close()

    def _retire_old(self) -> None:
        now = time.monotonic()
        with self._lock:
            others = [s for s in self._served.values() if not s.pins and s.snapshot.version != self.newest]
            others.sort(key=lambda served: served.asked_at, reverse=True)
            for rank, served in enumerate(others):
                if rank >= MAX_KEPT or now - served.asked_at > GRACE_S:
                    del self._served[served.snapshot.version.hash]
                    os.close(served.descriptor)
                    if served.snapshot.path not in [other.snapshot.path for other in self._served.values()]:
                        served.snapshot.path.unlink(missing_ok=True)

    def _sockets(self) -> Iterable[Any]:
        return [*super()._sockets(), self.announcements.socket, self._inlet]

    def _turn(self, ready: Mapping[Any, int]) -> None:
        if self._inlet in ready:
            with suppress(zmq.ZMQError):
                self.announcements.send(self._inlet.recv_multipart())
        if self.announcements.socket in ready and (subscription := self.announcements.receive()):
            self._receive_subscription(subscription)

    def _close_sockets(self) -> None:
        super()._close_sockets()
        self.announcements.close()
        self._inlet.close()

    def _receive_subscription(self, arrival: Arrival) -> None:
        self._admit(self.announcements, arrival.connection)
        self.announcements.settle(arrival)
        if bytes(arrival.frames[0]) not in (SUBSCRIBE, UNSUBSCRIBE):
            self.announcements.refuse("malformed", "got no subscription to everything")
            self.announcements.expel(arrival.connection, Closing.MALFORMED, "it sent what no peer sends")


def _make_pair(context: "zmq.Context[Any]") -> tuple[Any, Any]:
    """Two ends within the process: one for whoever publishes, one for the thread that owns the sockets."""
    outer, inner = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    address = f"inproc://announcements-{id(outer)}"
    for end in (outer, inner):
        end.setsockopt(zmq.LINGER, 0)
    inner.bind(address)
    outer.connect(address)
    return outer, inner
