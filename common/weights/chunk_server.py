"""Answers requests for snapshots on a ROUTER socket, one chunk per credit: the learner's, and any actor's that passes
versions on.

A peer that holds another version gets deltas of a chunk, where there are any from that very one and they are shorter.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import zmq

from common.version import Version
from common.watchdog import Watch
from common.weights.deltas import Delta, Deltas
from common.weights.fan_out import FanOut
from common.weights.snapshot import Snapshot
from common.wire.codec import Buffer, WireError, decode, encode
from common.wire.connections import Closing, Connection
from common.wire.listener import Arrival, Listener
from common.wire.messages import Chunk, ChunkRequest, ManifestReply, ManifestRequest

MAX_REQUEST_BYTES = 64 << 10
MAX_WAITING_BYTES = 1 << 20
"""Requests of one peer that wait to be answered."""
TRACKED_BYTES = 64 << 10
"""Smaller replies are copied by ZeroMQ, and not followed."""
MAX_UNSENT_BYTES = 64 << 20
"""Chunks handed to ZeroMQ that no peer has taken yet; no request is answered while there are more."""
STALL_S = 2.0
"""Where nobody takes a chunk for so long, those who asked for the oldest are shown out."""


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


class ChunkServer:
    """Consumes snapshots from `offer`; its thread answers peers. Waits for nobody: each fetches at its own pace."""

    def __init__(self, requests: Listener, *, fan_out: FanOut | None = None, watch: Watch | None = None) -> None:
        """`fan_out` names peers that others are to ask; None: all are to ask here."""
        self.requests = requests
        self.port = requests.port
        self._fan_out = fan_out
        self._watch = watch
        self._unsent: deque[Unsent] = deque()
        self._taken_at = time.monotonic()
        self._served: dict[str, Served] = {}
        self._deltas = Deltas()
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self.sent_bytes = 0
        self._thread = threading.Thread(target=self._serve, name="weight-server", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, snapshot: Snapshot, *, pin: bool = False, delta: Delta | None = None) -> None:
        """Let peers fetch a snapshot, or the delta that leads to it; `pin` keeps it until `unpin`."""
        descriptor = os.open(snapshot.path, os.O_RDONLY)
        with self._lock:
            pins = {snapshot.version.step} if pin else set[int]()
            if known := self._served.get(snapshot.version.hash):
                os.close(known.descriptor)
                pins |= known.pins
                if known.snapshot.path != snapshot.path:
                    known.snapshot.path.unlink(missing_ok=True)
            self._served[snapshot.version.hash] = Served(snapshot, descriptor, pins)
            if delta:
                self._deltas.add(delta, max_bytes=snapshot.manifest.num_bytes)

    def withdraw(self, version: Version) -> None:
        """Its file is about to become another: no byte of it is read from now on."""
        with self._lock:
            if served := self._served.pop(version.hash, None):
                os.close(served.descriptor)

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
        with self._lock:
            self._deltas.close()

    def _sockets(self) -> Iterable[Any]:
        """What the thread listens to."""
        return [self.requests.socket]

    def _turn(self, ready: Mapping[Any, int]) -> None:
        """What else there is to do, with those of the sockets that have something."""

    def _close_sockets(self) -> None:
        self.requests.close()

    def _serve(self) -> None:
        poller = zmq.Poller()
        for source in self._sockets():
            poller.register(source, zmq.POLLIN)
        while not self._is_closing.is_set():
            if self._watch:
                self._watch.beat()
            ready = dict(poller.poll(100))
            self._turn(ready)
            if not self._has_room():
                self._is_closing.wait(0.002)
            elif self.requests.socket in ready and (arrival := self.requests.receive()):
                self._receive_request(arrival)
                self.requests.settle(arrival)
        if self._watch:
            self._watch.rest()
        self._close_sockets()

    def _receive_request(self, arrival: Arrival) -> None:
        try:
            header, *data = self._answer(decode(arrival.frames, max_bytes=MAX_REQUEST_BYTES).message, arrival)
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

    def _answer(self, request: object, arrival: Arrival) -> list[Buffer]:
        if isinstance(request, ManifestRequest):
            return self._manifest(request, arrival)
        if isinstance(request, ChunkRequest):
            return self._chunk(request)
        raise WireError(f"got {type(request).__name__}, expected a request for weights")

    def _manifest(self, request: ManifestRequest, arrival: Arrival) -> list[Buffer]:
        with self._lock:
            served = self._served.get(request.version.hash)
            if served:
                served.asked_at = time.monotonic()
        if served is None:
            return encode(self._absent(request).stamped(request.version))
        manifest = served.snapshot.manifest
        header = ManifestReply(
            request_id=request.request_id,
            version=manifest.version,
            num_bytes=manifest.num_bytes,
            chunk_bytes=manifest.chunk_bytes,
            relay=self._relay_for(request, arrival),
        )
        return encode(header.stamped(manifest.version), [b"".join(manifest.chunk_hashes)])

    def _absent(self, request: ManifestRequest) -> ManifestReply:
        return ManifestReply(request_id=request.request_id, version=request.version, num_bytes=0, chunk_bytes=1)

    def _relay_for(self, request: ManifestRequest, arrival: Arrival) -> str:
        host = arrival.connection.host
        if self._fan_out is None or not request.relay_port or not host:
            return ""
        address = f"{host}:{request.relay_port}"
        return self._fan_out.place(address, version_hash=request.version.hash, key_name=arrival.key_name)

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
