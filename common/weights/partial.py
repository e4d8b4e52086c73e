"""A version that is being fetched: the file that it will be, and what of it is still missing.

Without a base the file is written chunk by chunk. Where it was that of another version, each chunk is patched where it
lies; no byte is copied, so that actors on one machine cost each other little.
"""

import logging
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import OperatorError
from common.weights.delta import DeltaError, patch
from common.weights.deltas import Recording
from common.weights.snapshot import Manifest, Snapshot, hash_chunk
from common.wire.codec import Buffer

log = logging.getLogger(__name__)


@dataclass
class Partial:
    """What of a version is on disk; survives a failed attempt, so that the next one goes on from there."""

    manifest: Manifest
    path: Path
    missing: list[int]
    """Chunks still to come, the next one last."""
    base: Snapshot | None
    """What those are until then, where the file was this snapshot's; None where they are to come whole."""
    recording: Recording | None
    """Of the deltas that came, where they are to be passed on."""
    spoiled: set[int] = field(default_factory=set[int])
    """Chunks that are neither the base's nor the new ones: they must come whole."""

    @staticmethod
    def begin(manifest: Manifest, folder: Path, base: Snapshot | None, *, records: bool) -> "Partial":
        """`base`: its file becomes this one, where it can; nobody may read it any more."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{manifest.version.hash[:12]}.partial"
        missing = list(reversed(range(manifest.num_chunks)))
        if base and _can_become(base, manifest):
            os.replace(base.path, path)
            return Partial(manifest, path, missing, base, Recording(folder) if records else None)
        with path.open("wb") as file:
            file.truncate(manifest.num_bytes)
        return Partial(manifest, path, missing, None, None)

    def base_of(self, index: int) -> str:
        """Hash of the version that a chunk is of now; empty: of none."""
        return self.base.version.hash if self.base and index not in self.spoiled else ""

    def give_up_base(self) -> None:
        if self.base:
            log.warning(
                "a delta from %s did not give %s: fetching what is missing whole", self.base.version,
                self.manifest.version,
            )  # fmt: skip
            self.base = None

    def discard(self) -> None:
        self.path.unlink(missing_ok=True)
        self.forget_recording()

    def forget_recording(self) -> None:
        if self.recording:
            self.recording.close()
            self.recording = None


@dataclass
class Attempt:
    """One go at the missing chunks."""

    partial: Partial
    file: int
    """Descriptor of the partial file."""
    content: memoryview
    """All of it, where there is a base to be patched. It has its place on the disk already: none of it can be full."""
    asked: dict[int, float] = field(default_factory=dict[int, float])
    """Chunks that were asked for, and when."""

    @staticmethod
    def on(partial: Partial, file: int) -> "Attempt":
        return Attempt(partial, file, _map(file) if partial.base else memoryview(b""))

    @property
    def num_stored(self) -> int:
        return self.partial.manifest.num_chunks - len(self.partial.missing) - len(self.asked)

    def ask_again(self, index: int) -> None:
        del self.asked[index]
        self.partial.missing.append(index)

    def store(self, index: int, frames: "list[Buffer]", *, num_deltas: int) -> bool:
        """Keep a chunk that was asked for; False, and it is not kept, where its hash is wrong."""
        partial, manifest = self.partial, self.partial.manifest
        offset, length = manifest.chunk_span(index)
        data = self._patch(frames, offset, length) if num_deltas else frames[0]
        if len(data) != length or hash_chunk(data) != manifest.chunk_hashes[index]:
            if num_deltas:
                partial.spoiled.add(index)
            return False
        if not num_deltas:
            _write(self.file, data, offset)
        if partial.recording and not partial.recording.add(index, frames, num_deltas=num_deltas):
            partial.forget_recording()
        del self.asked[index]
        return True

    def _patch(self, deltas: "list[Buffer]", offset: int, length: int) -> Buffer:
        """The chunk, patched where it lies; nothing where that cannot be done."""
        if self.partial.base is None:
            return b""
        chunk = self.content[offset : offset + length]
        try:
            for delta in deltas:
                patch(chunk, delta)
        except DeltaError as error:
            log.debug("%s", error)
            return b""
        return chunk


def _can_become(base: Snapshot, manifest: Manifest) -> bool:
    """Whether its file is there, as long as it was, and cut into the same chunks."""
    layouts = {(one.num_bytes, one.chunk_bytes) for one in (base.manifest, manifest)}
    with suppress(FileNotFoundError):
        return len(layouts) == 1 and base.path.stat().st_size == manifest.num_bytes
    return False


def _map(file: int) -> memoryview:
    return memoryview(mmap.mmap(file, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))


def _write(descriptor: int, data: Buffer, offset: int) -> None:
    """All of `data`: a disk that fills up takes a part of it first."""
    try:
        while data:
            num_written = os.pwrite(descriptor, data, offset)
            data, offset = data[num_written:], offset + num_written
    except OSError as error:
        raise OperatorError(f"weights: {error.strerror}, expected room on the disk of run.dir") from error
