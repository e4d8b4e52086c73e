"""Serves snapshots: announces the newest on an XPUB socket, answers requests on a ROUTER, one chunk per credit.

A peer that holds another version gets deltas of a chunk, where there are any from that very one and they are shorter.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import zmq

from common.keys.allowed import ServerKeys
from common.version import Version
from common.watchdog import Watch
from common.weights.deltas import Delta, Deltas
from common.weights.snapshot import Snapshot
from common.wire.codec import Buffer, WireError, decode, encode
from common.wire.connections import Bounds, Closing, Connection
from common.wire.listener import Arrival, Listener
from common.wire.messages import Announcement, Chunk, ChunkRequest, ManifestReply, ManifestRequest
from common.wire.sockets import SocketLimits

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""An older version that was asked for within this time is kept, so that a fetch in progress can end."""
MAX_KEPT = 4
"""Versions kept for such fetches at most, the newest aside; pinned ones come on top."""
MAX_REQUEST_BYTES = 64 << 10
MAX_WAITING_BYTES = 1 << 20
"""Requests of one peer that wait to be answered."""
TRACKED_BYTES = 64 << 10
"""Smaller replies are copied by ZeroMQ, and not followed."""
MAX_UNSENT_BYTES = 64 << 20
"""Chunks handed to ZeroMQ that no peer has taken yet; no request is answered while there are more."""
STALL_S = 2.0
"""Where nobody takes a chunk for so long, those who asked for the oldest are shown out."""


SUBSCRIBE, UNSUBSCRIBE = b"\x01", b"\x00"
"""To everything, which is all that there is."""


@dataclass
class Served:
    """A snapshot that can be fetched; the open descriptor outlives the deletion of its file."""

    snapshot: Snapshot
    descriptor: int
    pins: set[int]
    """Steps of the versions with these very bytes that are to be kept."""
    asked_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Unsent:
    """A chunk on its way."""

    connection: Connection
    num_bytes: int
    tracker: Any
    """Tells when ZeroMQ has let go of the bytes."""


class WeightServer:
    """Consumes snapshots from `publish`; its thread answers peers. Waits for nobody: each fetches at its own pace."""

    def __init__(
        self, context: "zmq.Context[Any]", *, host: str, port: int, limits: SocketLimits, announcements_port: int = 0,
        max_connections: int = 256, keys: ServerKeys | None = None, watch: Watch | None = None,
        guard_watch: Callable[[str], Watch] | None = None,
    ) -> None:  # fmt: skip
        self._watch = watch
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
        self.requests = listen(zmq.ROUTER, port, "weights")
        self.announcements_port, self.port = self.announcements.port, self.requests.port
        self._outbox, self._inlet = _make_pair(context)
        self._unsent: deque[Unsent] = deque()
        self._taken_at = time.monotonic()
        self._served: dict[str, Served] = {}
        self._deltas = Deltas()
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self.newest: Version | None = None
        self.sent_bytes = 0
        self._thread = threading.Thread(target=self._serve, name="weight-server", daemon=True)
        self._thread.start()

    def publish(self, snapshot: Snapshot, *, pin: bool, delta: Delta | None = None) -> None:
        """Offer a snapshot as the newest, with the delta that leads to it, and announce it. One thread at a time."""
        self.offer(snapshot, pin=pin)
        if delta:
            with self._lock:
                self._deltas.add(delta, max_bytes=snapshot.manifest.num_bytes)
        self.newest = snapshot.version
        self._retire_old()
        header = Announcement(version=snapshot.version).stamped(snapshot.version)
        with suppress(zmq.ZMQError):  # closed, or announcements faster than they can be sent: the next one will do
            self._outbox.send_multipart(encode(header), flags=zmq.NOBLOCK)

    def offer(self, snapshot: Snapshot, *, pin: bool) -> None:
        """Let peers fetch a snapshot; `pin` keeps it until `unpin`."""
        descriptor = os.open(snapshot.path, os.O_RDONLY)
        with self._lock:
            pins = {snapshot.version.step} if pin else set[int]()
            if known := self._served.get(snapshot.version.hash):
                os.close(known.descriptor)
                pins |= known.pins
                if known.snapshot.path != snapshot.path:
                    known.snapshot.path.unlink(missing_ok=True)
            self._served[snapshot.version.hash] = Served(snapshot, descriptor, pins)

    def unpin(self, version: Version) -> None:
        with self._lock:
            if served := self._served.get(version.hash):
                served.pins.discard(version.step)

    @property
    def num_pinned(self) -> int:
        with self._lock:
            return sum(len(served.pins) for served in self._served.values())

    @property
    def num_deltas(self) -> int:
        with self._lock:
            return len(self._deltas)

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join(timeout=5)
        self._outbox.close()
        with self._lock:
            self._deltas.close()

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

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in (self.requests.socket, self.announcements.socket, self._inlet):
            poller.register(source, zmq.POLLIN)
        while not self._is_closing.is_set():
            if self._watch:
                self._watch.beat()
            ready = dict(poller.poll(100))
            if self._inlet in ready:
                with suppress(zmq.ZMQError):
                    self.announcements.send(self._inlet.recv_multipart())
            if self.announcements.socket in ready and (subscription := self.announcements.receive()):
                self._receive_subscription(subscription)
            if not self._has_room():
                self._is_closing.wait(0.002)
            elif self.requests.socket in ready and (arrival := self.requests.receive()):
                self._receive_request(arrival)
                self.requests.settle(arrival)
        if self._watch:
            self._watch.rest()
        for listener in (self.requests, self.announcements):
            listener.close()
        self._inlet.close()

    def _receive_subscription(self, arrival: Arrival) -> None:
        self._admit(self.announcements, arrival.connection)
        self.announcements.settle(arrival)
        if bytes(arrival.frames[0]) not in (SUBSCRIBE, UNSUBSCRIBE):
            self.announcements.refuse("malformed", "got no subscription to everything")
            self.announcements.expel(arrival.connection, Closing.MALFORMED, "it sent what no peer sends")

    def _receive_request(self, arrival: Arrival) -> None:
        try:
            header, *data = self._answer(decode(arrival.frames, max_bytes=MAX_REQUEST_BYTES).message)
        except WireError as error:
            self.requests.refuse("malformed", str(error))
            self.requests.expel(arrival.connection, Closing.MALFORMED, "it sent what no peer sends")
            return
        if not self._admit(self.requests, arrival.connection):
            return
        with suppress(zmq.ZMQError):  # the peer has gone or does not read; it asks again if it lives
            reply, num_bytes = [arrival.routing_id, header, *data], sum(map(len, data))
            if num_bytes < TRACKED_BYTES:
                self.requests.send(reply)
            else:
                tracker = self.requests.send(reply, copy=False, track=True)
                self._unsent.append(Unsent(arrival.connection, num_bytes, tracker))

    def _admit(self, listener: Listener, connection: Connection) -> bool:
        if not connection.is_admitted and listener.is_full:
            listener.expel(connection, Closing.FULL, "network.max_connections others are served")
            return False
        listener.admit(connection)
        return True

    def _has_room(self) -> bool:
        """Whether more chunks may go out; shows those out who asked for the oldest and take nothing."""
        now = time.monotonic()
        # What was meant for a closed connection is let go of only when its own requests have been read to the end.
        still = deque(unsent for unsent in self._unsent if unsent.connection.is_open and not unsent.tracker.done)
        if len(still) < len(self._unsent):
            self._taken_at = now
        self._unsent = still
        if sum(unsent.num_bytes for unsent in still) <= MAX_UNSENT_BYTES:
            return True
        if now - self._taken_at > STALL_S:
            self.requests.expel(still[0].connection, Closing.STALLED, "it asked for chunks and does not take them")
            self._taken_at = now
        return False

    def _answer(self, request: object) -> list[Buffer]:
        if isinstance(request, ManifestRequest):
            return self._manifest(request)
        if isinstance(request, ChunkRequest):
            return self._chunk(request)
        raise WireError(f"got {type(request).__name__}, expected a request for weights")

    def _manifest(self, request: ManifestRequest) -> list[Buffer]:
        with self._lock:
            served = self._served.get(request.version.hash)
            if served:
                served.asked_at = time.monotonic()
        if served is None:
            gone = ManifestReply(request_id=request.request_id, version=request.version, num_bytes=0, chunk_bytes=1)
            return encode(gone.stamped(request.version))
        manifest = served.snapshot.manifest
        header = ManifestReply(
            request_id=request.request_id,
            version=manifest.version,
            num_bytes=manifest.num_bytes,
            chunk_bytes=manifest.chunk_bytes,
        )
        return encode(header.stamped(manifest.version), [b"".join(manifest.chunk_hashes)])

    def _chunk(self, request: ChunkRequest) -> list[Buffer]:
        header = Chunk(request_id=request.request_id, version=request.version, index=request.index)
        header = header.stamped(request.version)
        with self._lock:
            served = self._served.get(request.version.hash)
            if served is None or request.index >= served.snapshot.manifest.num_chunks:
                return encode(header)
            served.asked_at = time.monotonic()
            offset, length = served.snapshot.manifest.chunk_span(request.index)
            chain = self._deltas.between(request.base, request.version.hash)
            data = [delta.chunk(request.index) for delta in chain]
            if not data or sum(map(len, data)) >= length:
                chain, data = [], [os.pread(served.descriptor, length, offset)]
        self.sent_bytes += sum(map(len, data))
        return encode(header.model_copy(update={"num_deltas": len(chain)}), data)


def _make_pair(context: "zmq.Context[Any]") -> tuple[Any, Any]:
    """Two ends within the process: one for whoever publishes, one for the thread that owns the sockets."""
    outer, inner = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    address = f"inproc://announcements-{id(outer)}"
    for end in (outer, inner):
        end.setsockopt(zmq.LINGER, 0)
    inner.bind(address)
    outer.connect(address)
    return outer, inner
