"""One policy version on disk: a safetensors file, cut into hashed chunks.

The hash of a version is the hash of its chunk hashes, so that each chunk can be checked as it arrives and the whole
needs no second pass. The file's bytes depend on the tensors alone: equal weights have equal hashes, whoever wrote them.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from blake3 import blake3

from common.version import Version

if TYPE_CHECKING:
    import torch

HASH_BYTES = 16


@dataclass(frozen=True)
class Manifest:
    """What a peer must know to fetch and check a snapshot."""

    version: Version
    num_bytes: int
    chunk_bytes: int
    chunk_hashes: tuple[bytes, ...]
    """HASH_BYTES each, in file order."""

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_hashes)

    def chunk_span(self, index: int) -> tuple[int, int]:
        """Offset and length of chunk `index` in the file."""
        offset = index * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.num_bytes - offset)


@dataclass(frozen=True)
class Snapshot:
    """A complete snapshot file whose bytes are those that the manifest names."""

    path: Path
    manifest: Manifest

    @property
    def version(self) -> Version:
        return self.manifest.version


def hash_chunk(data: bytes | memoryview) -> bytes:
    return blake3(data).digest(length=HASH_BYTES)


def hash_of_chunks(chunk_hashes: Iterable[bytes]) -> str:
    """The hash that names a version, hexadecimal."""
    return hash_chunk(b"".join(chunk_hashes)).hex()


def write_snapshot(
    tensors: Mapping[str, "torch.Tensor"], path: Path, *, run_id: str, incarnation: int, step: int, chunk_bytes: int
) -> Snapshot:
    """Write `tensors` to `path`; it appears by rename, so a reader never sees half a file."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType]

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    cast(Any, save_file)(dict(tensors), partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    os.replace(partial, path)
    return read_snapshot(path, run_id=run_id, incarnation=incarnation, step=step, chunk_bytes=chunk_bytes)


def read_snapshot(path: Path, *, run_id: str, incarnation: int, step: int, chunk_bytes: int) -> Snapshot:
    """The snapshot of a file that is there: its bytes are what the version is named by."""
    hashes = tuple(_chunk_hashes(path, chunk_bytes))
    version = Version(run_id=run_id, incarnation=incarnation, step=step, hash=hash_of_chunks(hashes))
    return Snapshot(path, Manifest(version, path.stat().st_size, chunk_bytes, hashes))


def is_whole(snapshot: Snapshot) -> bool:
    """Whether its file still has the bytes that its version is named by."""
    try:
        return hash_of_chunks(_chunk_hashes(snapshot.path, snapshot.manifest.chunk_bytes)) == snapshot.version.hash
    except FileNotFoundError:
        return False


def read_chunks(path: Path, chunk_bytes: int) -> Iterator[memoryview]:
    """Each in the memory of the one before, as fresh memory costs more than what is done in it."""
    buffer = memoryview(bytearray(chunk_bytes))
    with path.open("rb", buffering=0) as file:
        while length := file.readinto(buffer):
            yield buffer[:length]


def _chunk_hashes(path: Path, chunk_bytes: int) -> Iterable[bytes]:
    return map(hash_chunk, read_chunks(path, chunk_bytes))
