"""The mark: how many transactions the ledger has acknowledged, in a file of its own.

SQLite takes a write-ahead log that was cut or damaged for one that simply ends earlier, and goes on from there. The
mark is written after each transaction, so a ledger that holds fewer transactions than it says has lost some.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import OperatorError
from learner.ledger.schema import row_digest

NUM_DIGITS = 16
LINE_BYTES = NUM_DIGITS + 18


class Mark:
    """Two lines of fixed length, written in turn, so that one is whole whenever a write is cut short.

    It needs no sync: it may be older than the ledger, never newer. Raises OperatorError where the disk refuses.
    """

    def __init__(self, path: Path, *, is_read_only: bool = False) -> None:
        self._path = path
        with self._reporting():
            self._descriptor = os.open(path, os.O_RDONLY if is_read_only else os.O_RDWR | os.O_CREAT, 0o644)

    def read(self) -> int:
        """Transactions acknowledged; 0 where nothing was written yet. Raises OperatorError where it is damaged."""
        with self._reporting():
            data = os.pread(self._descriptor, 2 * LINE_BYTES, 0)
        numbers = [
            line[:NUM_DIGITS] for line in (data[:LINE_BYTES], data[LINE_BYTES:]) if line == _line(line[:NUM_DIGITS])
        ]
        if len(data) > LINE_BYTES and not numbers:
            raise OperatorError(
                f"{self._path}: is damaged, expected the count of the ledger's transactions; "
                "delete it where the ledger beside it is known to be whole"
            )
        return max(map(int, numbers), default=0)

    def write(self, number: int) -> None:
        with self._reporting():
            os.pwrite(self._descriptor, _line(b"%0*d" % (NUM_DIGITS, number)), number % 2 * LINE_BYTES)

    def close(self) -> None:
        os.close(self._descriptor)

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OperatorError(f"{self._path}: {error.strerror}, expected a disk that can be written") from error


def _line(number: bytes) -> bytes:
    return number + b" " + row_digest(number).hex().encode() + b"\n"
