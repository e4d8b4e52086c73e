"""The relay: an actor passes the versions that it has fetched on to other actors, and reaches those that do so.

Nobody need trust it: the manifest comes from the learner, and every chunk is checked against that. It serves one file,
which becomes that of the next version where it lies, so it is withdrawn before; deltas are kept beside it.

With keys, it lets in who holds the very key that it has itself: actors know no other.
"""

from typing import Any

import zmq

from common.keys.folder import PeerKeys
from common.keys.pool import PoolKeys
from common.version import Version
from common.weights.chunk_server import MAX_REQUEST_BYTES, MAX_WAITING_BYTES, ChunkServer
from common.weights.deltas import Delta
from common.weights.snapshot import Snapshot
from common.wire.connections import Bounds
from common.wire.listener import Listener
from common.wire.messages import ManifestReply, ManifestRequest
from common.wire.sockets import SocketLimits, open_socket

MAX_CONNECTIONS = 256


class Relay(ChunkServer):
    """Owns a listening socket and its thread. `port` is where it listens."""

    def __init__(
        self, context: "zmq.Context[Any]", *, host: str, limits: SocketLimits, timeout_s: float,
        keys: PeerKeys | None = None,
    ) -> None:  # fmt: skip
        """`host`: this machine's address, as the learner sees it. `timeout_s`: longest wait for another relay."""
        self.timeout_s = timeout_s
        self._context = context
        self._limits = limits
        self._pool = PoolKeys(context, keys.pair) if keys else None
        self._expected: Version | None = None
        self._progress = 0
        self._passed_on: Version | None = None
        listener = Listener(
            context, zmq.ROUTER, host=host, port=0, purpose="other actors",
            limits=SocketLimits(limits.heartbeat_s, limits.silence_s, MAX_REQUEST_BYTES),
            bounds=Bounds(MAX_CONNECTIONS, MAX_WAITING_BYTES), keys=self._pool,
        )  # fmt: skip
        super().__init__(listener)
        self.start()

    def connect(self, address: str) -> Any:
        """A socket to another actor's relay."""
        keys = PeerKeys(self._pool.pair, self._pool.pair.public) if self._pool else None
        socket = open_socket(self._context, zmq.DEALER, self._limits, keys)
        socket.connect(f"tcp://{address}")
        return socket

    def expect(self, version: Version) -> None:
        """`version` is fetched from now on; its base's file is read no more."""
        if self._passed_on:
            self.withdraw(self._passed_on)
        self._expected, self._progress = version, 1

    def note_progress(self) -> None:
        """Something of what is expected came in, here or where it is to come from."""
        self._progress += 1

    def pass_on(self, snapshot: Snapshot, delta: Delta | None) -> None:
        self.offer(snapshot, delta=delta)
        self._passed_on = snapshot.version

    def close(self) -> None:
        super().close()
        if self._pool:
            self._pool.close()

    def _absent(self, request: ManifestRequest) -> ManifestReply:
        expected = self._expected
        is_coming = expected is not None and expected.hash == request.version.hash
        return super()._absent(request).model_copy(update={"progress": self._progress if is_coming else 0})
