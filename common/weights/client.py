"""Fetches a version: chunks by credit, each checked as it arrives, resumable after any break of the connection.

Of a version that is on disk already, deltas will do. Where the learner names a peer that passes the version on, that
one is asked first; whatever it lacks, keeps back or gets wrong comes from the learner.
"""

import logging
import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import zmq

from common.errors import WaitTimeout
from common.keys.folder import PeerKeys
from common.version import Version
from common.wait import Wait
from common.weights.partial import Attempt, Partial
from common.weights.relay import Relay
from common.weights.snapshot import HASH_BYTES, Manifest, Snapshot, hash_of_chunks, is_whole
from common.wire.codec import Buffer, Envelope, WireError, decode, encode
from common.wire.messages import Chunk, ChunkRequest, ManifestReply, ManifestRequest, Message
from common.wire.sockets import SocketLimits, open_socket

log = logging.getLogger(__name__)

POLL_MS = 100
ASK_RELAY_S = 0.05
"""Between two questions whether a peer has the version by now."""
MAX_CHUNKS = 1 << 20
"""Of one version: a manifest costs memory by its chunks."""


class VersionGone(Exception):
    """The learner no longer keeps this version; ask for the newest."""


class FetchCancelled(Exception):
    """The caller no longer wants the version."""


class RelayFailed(Exception):
    """A peer sent what is not the version."""


@dataclass(frozen=True)
class Source:
    """Whom chunks are asked of, and how patiently."""

    socket: Any
    whom: str
    timeout_s: float
    """Longest time without progress."""
    retry_s: float


class WeightClient:
    """Consumes the weight server's replies; waits for the learner, `timeout_s` at most without progress. One thread."""

    def __init__(
        self, context: "zmq.Context[Any]", address: str, folder: Path, *, limits: SocketLimits, credit: int,
        timeout_s: float, retry_s: float, keys: PeerKeys | None = None, relay: Relay | None = None,
    ) -> None:  # fmt: skip
        """`relay`: what was fetched is passed on there; it stays the caller's to close."""
        socket = open_socket(context, zmq.DEALER, limits, keys)
        socket.connect(address)
        self._learner = Source(socket, "learner", timeout_s, retry_s)
        self._relay = relay
        self._folder = folder
        self._credit = credit
        self._max_bytes = limits.max_frame_bytes
        self._partial: Partial | None = None
        self.received_bytes = 0

    def fetch(
        self, version: Version, is_wanted: Callable[[], bool] = lambda: True, *, base: Snapshot | None = None
    ) -> Snapshot:
        """The complete, verified snapshot of `version`. Raises WaitTimeout, VersionGone or FetchCancelled.

        `base`: a verified snapshot of the caller's. Its file becomes that of `version`, so nobody may read it any more.
        """
        if base and base.version.hash == version.hash and is_whole(base):
            return Snapshot(base.path, replace(base.manifest, version=version))
        partial, address = self._partial, ""
        if partial is None or partial.manifest.version.hash != version.hash:
            self._discard()
            manifest, address = self._fetch_manifest(version, is_wanted)
            if self._relay:
                self._relay.expect(version)
            self._partial = partial = Partial.begin(manifest, self._folder, base, records=self._relay is not None)
        if address and self._relay:
            self._fetch_from_peer(partial, address, self._relay, is_wanted)
        self._fetch_chunks(partial, self._learner, is_wanted)
        self._partial = None
        path = self._folder / f"{version.step:08d}-{version.hash[:12]}.safetensors"
        os.replace(partial.path, path)
        snapshot = Snapshot(path, replace(partial.manifest, version=version))
        if self._relay:
            recording, base = partial.recording, partial.base
            self._relay.pass_on(snapshot, recording.finish(base, snapshot) if recording and base else None)
        return snapshot

    def close(self) -> None:
        self._discard()
        self._learner.socket.close()

    def _discard(self) -> None:
        if self._partial:
            self._partial.discard()
            self._partial = None

    def _fetch_manifest(self, version: Version, is_wanted: Callable[[], bool]) -> tuple[Manifest, str]:
        """And the address of the peer that is to be asked for the rest; empty: none."""
        wait = Wait(self._learner.whom, limit_s=self._learner.timeout_s)
        request = ManifestRequest(version=version, relay_port=self._relay.port if self._relay else 0).stamped(version)
        asked_at = float("-inf")
        while True:
            if time.monotonic() - asked_at > self._learner.retry_s:
                self._send(self._learner, request)
                asked_at = time.monotonic()
            if found := self._receive_manifest(self._learner, version, is_wanted):
                return _read_manifest(*found), found[0].relay
            wait.check(f"the manifest of {version}")

    def _fetch_from_peer(self, partial: Partial, address: str, relay: Relay, is_wanted: Callable[[], bool]) -> None:
        """As many chunks as it will give; what it does not give stays missing."""
        with closing(relay.connect(address)) as socket:
            peer = Source(socket, f"the actor at {address}", relay.timeout_s, relay.timeout_s / 2)
            try:
                self._await_peer(peer, partial.manifest.version, is_wanted)
                self._fetch_chunks(partial, peer, is_wanted)
            except (RelayFailed, VersionGone, WaitTimeout) as error:
                log.warning(
                    "%s does not pass %s on (%s): asking the learner", peer.whom, partial.manifest.version, error
                )

    def _await_peer(self, peer: Source, version: Version, is_wanted: Callable[[], bool]) -> None:
        """Return once it has the version; while it gets on with fetching that, so does this one."""
        wait, limit = Wait(peer.whom, limit_s=peer.timeout_s), Wait(peer.whom, limit_s=self._learner.timeout_s)
        progress = 0
        while True:
            self._send(peer, ManifestRequest(version=version).stamped(version))
            found = self._receive_manifest(peer, version, is_wanted)
            if found and found[0].num_bytes:
                return
            if found and found[0].progress > progress:
                progress = found[0].progress
                self._note_progress(wait)
            for one in (wait, limit):
                one.check(f"its copy of {version}")
            time.sleep(ASK_RELAY_S)

    def _receive_manifest(
        self, source: Source, version: Version, is_wanted: Callable[[], bool]
    ) -> "tuple[ManifestReply, Any] | None":
        envelope = self._receive(source, is_wanted)
        message = envelope.message if envelope else None
        if envelope and isinstance(message, ManifestReply) and message.version.hash == version.hash:
            return message, envelope.frames
        return None

    def _fetch_chunks(self, partial: Partial, source: Source, is_wanted: Callable[[], bool]) -> None:
        with partial.path.open("r+b", buffering=0) as file:
            attempt = Attempt.on(partial, file.fileno())
            try:
                self._try_chunks(attempt, source, is_wanted)
            finally:
                partial.missing += attempt.asked

    def _try_chunks(self, attempt: Attempt, source: Source, is_wanted: Callable[[], bool]) -> None:
        manifest, missing, asked = attempt.partial.manifest, attempt.partial.missing, attempt.asked
        wait, stored_at, retry_s = Wait(source.whom, limit_s=source.timeout_s), time.monotonic(), source.retry_s
        while missing or asked:
            now = time.monotonic()
            # While others come in, a chunk is on its way. Where one alone takes so long, it is soon waited for.
            if late := [index for index, at in asked.items() if now - max(at, stored_at) > retry_s]:
                retry_s = max(min(2 * retry_s, source.timeout_s / 4), source.retry_s)
            for index in late:
                attempt.ask_again(index)
            while missing and len(asked) < self._credit:
                self._ask(attempt, source, missing.pop())
            envelope = self._receive(source, is_wanted)
            if envelope and self._store(envelope, attempt, source):
                stored_at = time.monotonic()
                self._note_progress(wait)
            wait.check(f"chunk {attempt.num_stored + 1}/{manifest.num_chunks} of {manifest.version}")

    def _ask(self, attempt: Attempt, source: Source, index: int) -> None:
        version = attempt.partial.manifest.version
        attempt.asked[index] = time.monotonic()
        request = ChunkRequest(version=version, index=index, base=attempt.partial.base_of(index))
        self._send(source, request.stamped(version))

    def _store(self, envelope: Envelope, attempt: Attempt, source: Source) -> bool:
        """Keep a wanted chunk whose hash is right. A broken one is asked for again in time, one that came of deltas at
        once and whole; a peer that sends one is asked no more."""
        message, partial = envelope.message, attempt.partial
        if (
            not isinstance(message, Chunk)
            or message.version.hash != partial.manifest.version.hash
            or message.index not in attempt.asked
        ):
            return False
        if not envelope.frames:
            raise VersionGone(str(partial.manifest.version))
        if not attempt.store(message.index, list(envelope.frames), num_deltas=message.num_deltas):
            if source is not self._learner:
                raise RelayFailed(f"got chunk {message.index} with another hash than the version's")
            if message.num_deltas:
                partial.give_up_base()
                attempt.ask_again(message.index)
            return False
        self.received_bytes += sum(map(len, envelope.frames))
        return True

    def _note_progress(self, wait: Wait) -> None:
        wait.progress()
        if self._relay:
            self._relay.note_progress()

    def _send(self, source: Source, message: Message) -> None:
        with suppress(zmq.Again):  # the queue to an unreachable learner is full; it is sent again after `retry_s`
            source.socket.send_multipart(encode(message), flags=zmq.NOBLOCK)

    def _receive(self, source: Source, is_wanted: Callable[[], bool]) -> Envelope | None:
        if not is_wanted():
            raise FetchCancelled
        if not source.socket.poll(POLL_MS):
            return None
        try:
            return decode(source.socket.recv_multipart(), max_bytes=self._max_bytes)
        except WireError:
            return None


def _read_manifest(reply: ManifestReply, frames: "list[Buffer] | Any") -> Manifest:
    if reply.num_bytes == 0 or not frames:
        raise VersionGone(str(reply.version))
    num_chunks = -(-reply.num_bytes // reply.chunk_bytes)
    if num_chunks > MAX_CHUNKS or len(frames[0]) != num_chunks * HASH_BYTES:
        raise VersionGone(f"{reply.version}: its manifest names {num_chunks} chunks in {len(frames[0])} bytes")
    joined = bytes(frames[0])
    hashes = tuple(joined[i : i + HASH_BYTES] for i in range(0, len(joined), HASH_BYTES))
    if hash_of_chunks(hashes) != reply.version.hash:
        raise VersionGone(f"{reply.version}: its manifest does not match its hash")
    return Manifest(reply.version, reply.num_bytes, reply.chunk_bytes, hashes)
