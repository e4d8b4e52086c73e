"""Serves snapshots: announces the newest on a PUB socket, answers requests on a ROUTER, one chunk per credit."""

import logging
import os
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import zmq

from common.version import Version
from common.weights.snapshot import Snapshot
from common.wire.codec import Buffer, WireError, decode, encode
from common.wire.messages import Announcement, Chunk, ChunkRequest, ManifestReply, ManifestRequest
from common.wire.sockets import SocketLimits, bind, open_socket

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""An older version that was asked for within this time is kept, so that a fetch in progress can end."""
MAX_KEPT = 4
"""Versions kept for such fetches at most, the newest aside; pinned ones come on top."""
MAX_REQUEST_BYTES = 64 << 10


@dataclass
class Served:
    """A snapshot that can be fetched; the open descriptor outlives the deletion of its file."""

    snapshot: Snapshot
    descriptor: int
    pins: set[int]
    """Steps of the versions with these very bytes that are to be kept."""
    asked_at: float = field(default_factory=time.monotonic)


class WeightServer:
    """Consumes snapshots from `publish`; its thread answers peers. Waits for nobody: each fetches at its own pace."""

    def __init__(
        self, context: "zmq.Context[Any]", *, host: str, port: int, limits: SocketLimits, announcements_port: int = 0
    ) -> None:
        self._announcements = open_socket(context, zmq.PUB, limits)
        self._requests = open_socket(context, zmq.ROUTER, limits)
        self.announcements_port = bind(self._announcements, host, announcements_port, "announcements")
        self.port = bind(self._requests, host, port, "weights")
        self._served: dict[str, Served] = {}
        self._lock = threading.Lock()
        self._is_closing = threading.Event()
        self.newest: Version | None = None
        self.sent_bytes = 0
        self._thread = threading.Thread(target=self._serve, name="weight-server", daemon=True)
        self._thread.start()

    def publish(self, snapshot: Snapshot, *, pin: bool) -> None:
        """Offer a snapshot as the newest and announce it. Call it from one thread only."""
        self.offer(snapshot, pin=pin)
        self.newest = snapshot.version
        self._retire_old()
        header = Announcement(version=snapshot.version).stamped(snapshot.version)
        self._announcements.send_multipart(encode(header))

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

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join(timeout=5)
        self._announcements.close()

    def _retire_old(self) -> None:
        now = time.monotonic()
        with self._lock:
            others = [s for s in self._served.values() if not s.pins and s.snapshot.version != self.newest]
            others.sort(key=lambda served: served.asked_at, reverse=True)
            for rank, served in enumerate(others):
                if rank >= MAX_KEPT or now - served.asked_at > GRACE_S:
                    del self._served[served.snapshot.version.hash]
                    os.close(served.descriptor)
                    served.snapshot.path.unlink(missing_ok=True)

    def _serve(self) -> None:
        while not self._is_closing.is_set():
            if not self._requests.poll(100):
                continue
            peer, *frames = self._requests.recv_multipart()
            try:
                reply = self._answer(decode(frames, max_bytes=MAX_REQUEST_BYTES).message)
                self._requests.send_multipart([peer, *reply], flags=zmq.NOBLOCK, copy=False)
            except WireError as error:
                log.warning("weights: refused a message: %s", error)
            except zmq.ZMQError:
                pass  # the peer has gone or does not read; it asks again if it lives
        self._requests.close()

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
            data = os.pread(served.descriptor, length, offset)
        self.sent_bytes += len(data)
        return encode(header, [data])
