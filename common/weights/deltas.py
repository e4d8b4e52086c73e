"""The last few deltas from version to version, each in a file without a name, and the chains that they make."""

import os
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.weights.delta import Coding, encode
from common.weights.snapshot import Snapshot, read_chunks
from common.wire.codec import Buffer
from common.wire.messages import MAX_DELTAS


@dataclass(frozen=True)
class Delta:
    """What turns every chunk of one version into that of another."""

    base_hash: str
    hash: str
    """Of the version that it leads to."""
    file: IO[bytes]
    """The chunks' deltas one after the other; deleted already, gone when it is closed."""
    offsets: tuple[int, ...]
    """Where each begins, and where the last one ends."""

    @property
    def num_bytes(self) -> int:
        return self.offsets[-1]

    def chunk(self, index: int) -> bytes:
        begin, end = self.offsets[index : index + 2]
        return os.pread(self.file.fileno(), end - begin, begin)


def make_delta(base: Snapshot, new: Snapshot) -> Delta | None:
    """None where chunk does not answer to chunk, or nothing differs."""
    sizes = [(one.manifest.num_bytes, one.manifest.chunk_bytes) for one in (base, new)]
    if sizes[0] != sizes[1] or base.version.hash == new.version.hash:
        return None
    file = tempfile.TemporaryFile(dir=new.path.parent)  # noqa: SIM115 -- it lives as long as the delta
    offsets = [0]
    try:
        chunks = [read_chunks(one.path, one.manifest.chunk_bytes) for one in (base, new)]
        for before, after in zip(*chunks, strict=True):
            offsets.append(offsets[-1] + file.write(encode(before, after)))
        file.flush()
    except BaseException:
        file.close()
        raise
    return Delta(base.version.hash, new.version.hash, file, tuple(offsets))


class Recording:
    """The deltas of a version's chunks as they came in, in any order."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- closed with the recording
        self._spans: dict[int, tuple[int, int]] = {}
        self._end = 0

    def add(self, index: int, frames: Sequence[Buffer], *, num_deltas: int) -> bool:
        """False where they are a chain: it is no delta from one version to the next."""
        if num_deltas > 1:
            return False
        data = frames[0] if num_deltas else b"".join([bytes([Coding.RAW]), frames[0]])
        self._file.write(data)
        self._spans[index] = self._end, len(data)
        self._end += len(data)
        return True

    def finish(self, base: Snapshot, new: Snapshot) -> Delta | None:
        """What turns `base` into `new`, where all of it was recorded."""
        with self._file:
            if len(self._spans) < new.manifest.num_chunks:
                return None
            self._file.flush()
            file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 -- it lives as long as the delta
            offsets = [0]
            for index in range(new.manifest.num_chunks):
                begin, length = self._spans[index]
                file.write(os.pread(self._file.fileno(), length, begin))
                offsets.append(offsets[-1] + length)
            file.flush()
            return Delta(base.version.hash, new.version.hash, file, tuple(offsets))

    def close(self) -> None:
        self._file.close()


class Deltas:
    """Consecutive ones, oldest first: at most MAX_DELTAS, and together at most as long as a whole version."""

    def __init__(self) -> None:
        self._kept: deque[Delta] = deque()

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, delta: Delta, *, max_bytes: int) -> None:
        if self._kept and self._kept[-1].hash != delta.base_hash:
            self.close()
        self._kept.append(delta)
        while len(self._kept) > MAX_DELTAS or sum(one.num_bytes for one in self._kept) > max_bytes:
            self._kept.popleft().file.close()

    def between(self, base_hash: str, hash: str) -> list[Delta]:
        """What leads from one version to the other, in the order of use; empty where nothing does."""
        chain: list[Delta] = []
        for delta in reversed(self._kept):
            if chain or delta.hash == hash:
                chain.insert(0, delta)
            if chain and delta.base_hash == base_hash:
                return chain
        return []

    def close(self) -> None:
        while self._kept:
            self._kept.popleft().file.close()
