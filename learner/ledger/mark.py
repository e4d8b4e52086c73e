"""The mark: how many transactions the ledger has acknowledged, in a file of its own.

SQLite takes a write-ahead log that was cut or damaged for one that simply ends earlier, and goes on from there. The
mark is written after each transaction, so a ledger that holds fewer transactions than it says has lost some.
"""

import os
from pathlib import Path

from common.errors import OperatorError
from learner.ledger.schema import row_digest

NUM_DIGITS = 16


class Mark:
    """One line of fixed length, written in place. It needs no sync: it may be older than the ledger, never newer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)

    def read(self) -> int:
        """Transactions acknowledged; 0 where nothing was written yet. Raises OperatorError where it is damaged."""
        line = os.pread(self._descriptor, 256, 0)
        if not line:
            return 0
        number = line[:NUM_DIGITS]
        if line != _line(number):
            raise OperatorError(
                f"{self._path}: is damaged, expected the count of the ledger's transactions; "
                "delete it where the ledger beside it is known to be whole"
            )
        return int(number)

    def write(self, number: int) -> None:
        """Raises OperatorError where the disk refuses."""
        try:
            os.pwrite(self._descriptor, _line(b"%0*d" % (NUM_DIGITS, number)), 0)
        except OSError as error:
            raise OperatorError(f"{self._path}: {error.strerror}, expected a disk that takes writes") from error

    def close(self) -> None:
        os.close(self._descriptor)


def _line(number: bytes) -> bytes:
    return number + b" " + row_digest(number).hex().encode() + b"\n"
