"""Fetches a version: chunks by credit, each checked as it arrives, resumable after any break of the connection."""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from common.errors import OperatorError, WaitTimeout
from common.keys.folder import PeerKeys
from common.version import Version
from common.wait import Wait
from common.weights.snapshot import HASH_BYTES, Manifest, Snapshot, hash_chunk, hash_of_chunks
from common.wire.codec import Buffer, Envelope, WireError, decode, encode
from common.wire.messages import Chunk, ChunkRequest, ManifestReply, ManifestRequest, Message
from common.wire.sockets import SocketLimits, open_socket

POLL_MS = 100
MAX_CHUNKS = 1 << 20
"""Of one version: a manifest costs memory by its chunks."""


class VersionGone(Exception):
    """The learner no longer keeps this version; ask for the newest."""


class FetchCancelled(Exception):
    """The caller no longer wants the version."""


@dataclass
class Progress:
    """What of a version is on disk; survives a failed attempt, so that the next one goes on from there."""

    manifest: Manifest
    path: Path
    missing: list[int]
    """Chunks still to come, the next one last."""


class WeightClient:
    """Consumes the weight server's replies; waits for the learner, `timeout_s` at most without progress. One thread."""

    def __init__(
        self, context: "zmq.Context[Any]", address: str, folder: Path, *, limits: SocketLimits, credit: int,
        timeout_s: float, retry_s: float, keys: PeerKeys | None = None,
    ) -> None:  # fmt: skip
        self._socket = open_socket(context, zmq.DEALER, limits, keys)
        self._socket.connect(address)
        self._folder = folder
        self._credit = credit
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._max_bytes = limits.max_frame_bytes
        self._progress: Progress | None = None
        self.received_bytes = 0

    def fetch(self, version: Version, is_wanted: Callable[[], bool] = lambda: True) -> Snapshot:
        """The complete, verified snapshot of `version`. Raises WaitTimeout, VersionGone or FetchCancelled."""
        progress = self._progress
        if progress is None or progress.manifest.version.hash != version.hash:
            self._discard()
            progress = self._begin(self._fetch_manifest(version, is_wanted))
            self._progress = progress
        self._fetch_chunks(progress, is_wanted)
        self._progress = None
        path = self._folder / f"{version.step:08d}-{version.hash[:12]}.safetensors"
        os.replace(progress.path, path)
        return Snapshot(
            path,
            Manifest(
                version, progress.manifest.num_bytes, progress.manifest.chunk_bytes, progress.manifest.chunk_hashes
            ),
        )

    def close(self) -> None:
        self._discard()
        self._socket.close()

    def _discard(self) -> None:
        if self._progress:
            self._progress.path.unlink(missing_ok=True)
            self._progress = None

    def _begin(self, manifest: Manifest) -> Progress:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{manifest.version.hash[:12]}.partial"
        with path.open("wb") as file:
            file.truncate(manifest.num_bytes)
        return Progress(manifest, path, list(reversed(range(manifest.num_chunks))))

    def _fetch_manifest(self, version: Version, is_wanted: Callable[[], bool]) -> Manifest:
        wait = Wait("learner", limit_s=self._timeout_s)
        asked = time.monotonic()
        self._send(ManifestRequest(version=version).stamped(version))
        while True:
            envelope = self._receive(is_wanted)
            if (
                envelope
                and isinstance(envelope.message, ManifestReply)
                and envelope.message.version.hash == version.hash
            ):
                return _read_manifest(envelope.message, envelope.frames)
            wait.check(f"the manifest of {version}")
            if time.monotonic() - asked > self._retry_s:
                self._send(ManifestRequest(version=version).stamped(version))
                asked = time.monotonic()

    def _fetch_chunks(self, progress: Progress, is_wanted: Callable[[], bool]) -> None:
        manifest, outstanding = progress.manifest, dict[int, float]()
        wait, stored_at, retry_s = Wait("learner", limit_s=self._timeout_s), time.monotonic(), self._retry_s
        with progress.path.open("r+b", buffering=0) as file:
            while progress.missing or outstanding:
                now = time.monotonic()
                # While others come in, a chunk is on its way. Where one alone takes so long, it is soon waited for.
                if late := [i for i, asked in outstanding.items() if now - max(asked, stored_at) > retry_s]:
                    retry_s = max(min(2 * retry_s, self._timeout_s / 4), self._retry_s)
                for index in late:
                    del outstanding[index]
                    progress.missing.append(index)
                while progress.missing and len(outstanding) < self._credit:
                    index = progress.missing.pop()
                    outstanding[index] = now
                    self._send(ChunkRequest(version=manifest.version, index=index).stamped(manifest.version))
                try:
                    envelope = self._receive(is_wanted)
                    index = self._store(envelope, manifest, outstanding, file.fileno()) if envelope else None
                except (FetchCancelled, VersionGone):
                    progress.missing += outstanding
                    raise
                if index is not None:
                    del outstanding[index]
                    stored_at = time.monotonic()
                    wait.progress()
                done = manifest.num_chunks - len(progress.missing) - len(outstanding)
                try:
                    wait.check(f"chunk {done + 1}/{manifest.num_chunks} of {manifest.version}")
                except WaitTimeout:
                    progress.missing += outstanding
                    raise

    def _store(
        self, envelope: Envelope, manifest: Manifest, outstanding: dict[int, float], descriptor: int
    ) -> int | None:
        """Write a wanted chunk whose hash is right; None for any other message (a broken one is asked for again)."""
        message = envelope.message
        if (
            not isinstance(message, Chunk)
            or message.version.hash != manifest.version.hash
            or message.index not in outstanding
        ):
            return None
        if not envelope.frames:
            raise VersionGone(str(manifest.version))
        data = envelope.frames[0]
        offset, length = manifest.chunk_span(message.index)
        if len(data) != length or hash_chunk(data) != manifest.chunk_hashes[message.index]:
            return None
        _write(descriptor, data, offset)
        self.received_bytes += length
        return message.index

    def _send(self, message: Message) -> None:
        with suppress(zmq.Again):  # the queue to an unreachable learner is full; it is sent again after `retry_s`
            self._socket.send_multipart(encode(message), flags=zmq.NOBLOCK)

    def _receive(self, is_wanted: Callable[[], bool]) -> Envelope | None:
        if not is_wanted():
            raise FetchCancelled
        if not self._socket.poll(POLL_MS):
            return None
        try:
            return decode(self._socket.recv_multipart(), max_bytes=self._max_bytes)
        except WireError:
            return None


def _write(descriptor: int, data: Buffer, offset: int) -> None:
    """All of `data`: a disk that fills up takes a part of it first."""
    try:
        while data:
            num_written = os.pwrite(descriptor, data, offset)
            data, offset = data[num_written:], offset + num_written
    except OSError as error:
        raise OperatorError(f"weights: {error.strerror}, expected room on the disk of run.dir") from error


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
