"""The status board: what the learner does now and whom it waits for, in status.json for live views."""

import json
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

INTERVAL_S = 0.5


class StatusBoard:
    """Its thread writes what `read` returns, twice a second, by rename."""

    def __init__(self, path: Path, read: Callable[[], dict[str, Any]]) -> None:
        self._path = path
        self._read = read
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._is_closing.set()
        self._thread.join(timeout=5)
        self._write()

    def _run(self) -> None:
        while not self._is_closing.wait(INTERVAL_S):
            self._write()

    def _write(self) -> None:
        partial = self._path.with_suffix(".partial")
        try:
            partial.write_text(json.dumps(self._read()))
            partial.replace(self._path)
        except (OSError, sqlite3.Error):
            pass  # a full disk stops the ledger, which says so; the board is not what should
