"""Fetches a version: chunks by credit, each checked as it arrives, resumable after any break of the connection.

Of a version that is on disk already, deltas will do: each chunk is patched where it lies, and checked like any other.
No byte is copied, so that actors on one machine cost each other little.
"""

import logging
import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import zmq

from common.errors import OperatorError
from common.keys.folder import PeerKeys
from common.version import Version
from common.wait import Wait
from common.weights.delta import DeltaError, patch
from common.weights.snapshot import HASH_BYTES, Manifest, Snapshot, hash_chunk, hash_of_chunks, is_whole
from common.wire.codec import Buffer, Envelope, WireError, decode, encode
from common.wire.messages import Chunk, ChunkRequest, ManifestReply, ManifestRequest, Message
from common.wire.sockets import SocketLimits, open_socket

log = logging.getLogger(__name__)

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
    base: Snapshot | None
    """What those are until then, where the file was this snapshot's; None where they are to come whole."""


@dataclass
class Attempt:
    """One go at the missing chunks."""

    progress: Progress
    file: int
    """Descriptor of the partial file."""
    content: memoryview
    """All of it, where there is a base to be patched. It has its place on the disk already: none of it can be full."""
    asked: dict[int, float] = field(default_factory=dict[int, float])
    """Chunks that were asked for, and when."""

    def ask_again(self, index: int) -> None:
        del self.asked[index]
        self.progress.missing.append(index)


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

    def fetch(
        self, version: Version, is_wanted: Callable[[], bool] = lambda: True, *, base: Snapshot | None = None
    ) -> Snapshot:
        """The complete, verified snapshot of `version`. Raises WaitTimeout, VersionGone or FetchCancelled.

        `base`: a verified snapshot of the caller's. Its file becomes that of `version`, so nobody may read it any more.
        """
        if base and base.version.hash == version.hash and is_whole(base):
            return Snapshot(base.path, replace(base.manifest, version=version))
        progress = self._progress
        if progress is None or progress.manifest.version.hash != version.hash:
            self._discard()
            progress = self._begin(self._fetch_manifest(version, is_wanted), base)
            self._progress = progress
        self._fetch_chunks(progress, is_wanted)
        self._progress = None
        path = self._folder / f"{version.step:08d}-{version.hash[:12]}.safetensors"
        os.replace(progress.path, path)
        return Snapshot(path, replace(progress.manifest, version=version))

    def close(self) -> None:
        self._discard()
        self._socket.close()

    def _discard(self) -> None:
        if self._progress:
            self._progress.path.unlink(missing_ok=True)
            self._progress = None

    def _begin(self, manifest: Manifest, base: Snapshot | None) -> Progress:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{manifest.version.hash[:12]}.partial"
        missing = list(reversed(range(manifest.num_chunks)))
        if base and _can_become(base, manifest):
            os.replace(base.path, path)
            return Progress(manifest, path, missing, base)
        with path.open("wb") as file:
            file.truncate(manifest.num_bytes)
        return Progress(manifest, path, missing, None)

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
        with progress.path.open("r+b", buffering=0) as file:
            attempt = Attempt(progress, file.fileno(), _map(file.fileno()) if progress.base else memoryview(b""))
            try:
                self._try_chunks(attempt, is_wanted)
            finally:
                progress.missing += attempt.asked

    def _try_chunks(self, attempt: Attempt, is_wanted: Callable[[], bool]) -> None:
        manifest, missing, asked = attempt.progress.manifest, attempt.progress.missing, attempt.asked
        wait, stored_at, retry_s = Wait("learner", limit_s=self._timeout_s), time.monotonic(), self._retry_s
        while missing or asked:
            now = time.monotonic()
            # While others come in, a chunk is on its way. Where one alone takes so long, it is soon waited for.
            if late := [index for index, at in asked.items() if now - max(at, stored_at) > retry_s]:
                retry_s = max(min(2 * retry_s, self._timeout_s / 4), self._retry_s)
            for index in late:
                attempt.ask_again(index)
            while missing and len(asked) < self._credit:
                self._ask(attempt, missing.pop())
            envelope = self._receive(is_wanted)
            if envelope and self._store(envelope, attempt):
                stored_at = time.monotonic()
                wait.progress()
            done = manifest.num_chunks - len(missing) - len(asked)
            wait.check(f"chunk {done + 1}/{manifest.num_chunks} of {manifest.version}")

    def _ask(self, attempt: Attempt, index: int) -> None:
        version, base = attempt.progress.manifest.version, attempt.progress.base
        attempt.asked[index] = time.monotonic()
        request = ChunkRequest(version=version, index=index, base=base.version.hash if base else "")
        self._send(request.stamped(version))

    def _store(self, envelope: Envelope, attempt: Attempt) -> bool:
        """Keep a wanted chunk whose hash is right. A broken one is asked for again in time, one that came of deltas at
        once and whole."""
        message, manifest = envelope.message, attempt.progress.manifest
        if (
            not isinstance(message, Chunk)
            or message.version.hash != manifest.version.hash
            or message.index not in attempt.asked
        ):
            return False
        if not envelope.frames:
            raise VersionGone(str(manifest.version))
        offset, length = manifest.chunk_span(message.index)
        data = _patch(envelope, attempt, offset, length) if message.num_deltas else envelope.frames[0]
        if len(data) != length or hash_chunk(data) != manifest.chunk_hashes[message.index]:
            if message.num_deltas:
                _give_up_base(attempt.progress)
                attempt.ask_again(message.index)
            return False
        if not message.num_deltas:
            _write(attempt.file, data, offset)
        del attempt.asked[message.index]
        self.received_bytes += sum(map(len, envelope.frames))
        return True

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


def _can_become(base: Snapshot, manifest: Manifest) -> bool:
    """Whether its file is there, as long as it was, and cut into the same chunks."""
    layouts = {(one.num_bytes, one.chunk_bytes) for one in (base.manifest, manifest)}
    with suppress(FileNotFoundError):
        return len(layouts) == 1 and base.path.stat().st_size == manifest.num_bytes
    return False


def _map(file: int) -> memoryview:
    return memoryview(mmap.mmap(file, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))


def _patch(envelope: Envelope, attempt: Attempt, offset: int, length: int) -> Buffer:
    """The chunk, patched where it lies; nothing where that cannot be done."""
    if attempt.progress.base is None:
        return b""
    chunk = attempt.content[offset : offset + length]
    try:
        for delta in envelope.frames:
            patch(chunk, delta)
    except DeltaError as error:
        log.debug("%s", error)
        return b""
    return chunk


def _give_up_base(progress: Progress) -> None:
    if progress.base:
        log.warning(
            "a delta from %s did not give %s: fetching what is missing whole",
            progress.base.version,
            progress.manifest.version,
        )
        progress.base = None


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
