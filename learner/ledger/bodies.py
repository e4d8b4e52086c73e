"""The bodies: groups' tokens in files that only grow, beside the ledger, which says where each one lies.

What a transaction adds is on disk before it is committed, so every place that the ledger names is there; what a file
holds beyond those was never acknowledged. Each start writes to files of its own: no place is ever used twice.
"""

import os
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from common.errors import OperatorError
from learner.durable import sync

FILE_BYTES = 64 << 20
"""A file of this length takes no more bodies. It is deleted as a whole."""
HASH_BYTES = 16


class Place(NamedTuple):
    """Where a body lies, and what it is."""

    file: int
    start: int
    size: int
    hash: bytes


class Bodies:
    """`append` and `sync` are a transaction's; it must not be interrupted by another one."""

    def __init__(self, folder: Path) -> None:
        """Changes nothing: the folder and its files are made when there is something to write."""
        self._folder = folder
        self._file = max(self._files(), default=0) + 1
        """The one that is written."""
        self._descriptor: int | None = None
        self._end = 0
        self._added: list[bytes] = []
        """Not on disk yet; they begin at `_end`."""
        self._num_added_bytes = 0
        self._unnamed: set[int] = set()

    def _files(self) -> list[int]:
        return [int(path.stem) for path in self._folder.glob("*.bin")]

    def path(self, file: int) -> Path:
        return self._folder / f"{file:08d}.bin"

    def append(self, body: bytes) -> Place:
        """Where it will lie after `sync`."""
        place = Place(
            self._file, self._end + self._num_added_bytes, len(body), blake3(body).digest(length=HASH_BYTES)
        )  # fmt: skip
        self._added.append(body)
        self._num_added_bytes += len(body)
        return place

    def forget(self) -> None:
        """What was appended since the last `sync` is not wanted."""
        self._added, self._num_added_bytes = [], 0

    def sync(self) -> None:
        """Returns once everything that was appended is on disk. Raises OperatorError where the disk refuses."""
        if not self._added:
            return
        try:
            descriptor = self._open()
            rest = memoryview(b"".join(self._added))
            while rest:
                written = os.pwrite(descriptor, rest, self._end)
                self._end, rest = self._end + written, rest[written:]
            os.fdatasync(descriptor)
        except OSError as error:
            raise OperatorError(
                f"{self.path(self._file)}: {error.strerror}, expected free disk space and a writable file"
            ) from error
        self.forget()
        if self._end >= FILE_BYTES:
            self.close()

    def _open(self) -> int:
        if self._descriptor is None:
            self._folder.mkdir(exist_ok=True)
            self._descriptor = os.open(self.path(self._file), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            sync(self._folder)
            sync(self._folder.parent)
        return self._descriptor

    def read(self, place: Place) -> bytes | None:
        """None where it is not what was written."""
        try:
            with self.path(place.file).open("rb") as file:
                file.seek(place.start)
                body = file.read(place.size)
        except FileNotFoundError:
            return None
        return body if blake3(body).digest(length=HASH_BYTES) == place.hash else None

    def delete_unnamed(self, named: set[int]) -> None:
        """Delete the files that hold none of the ledger's bodies, now and when this was called last: until then,
        somebody who reads an earlier moment of the ledger may want them."""
        unnamed = set(self._files()) - named - {self._file}
        for file in unnamed & self._unnamed:
            self.path(file).unlink()
        self._unnamed = unnamed - self._unnamed

    def close(self) -> None:
        """The next body goes to a new file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor, self._end, self._file = None, 0, self._file + 1
