"""Evaluations in the ledger: owed from when a version is published until its result is in."""

import json
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from common.wire.messages import Outcome
from learner.ledger.database import Database


class Evaluations:
    """One for each evaluated version, by its step."""

    def __init__(self, database: Database, changed: threading.Condition) -> None:
        """`changed` is notified when one is finished."""
        self._db = database
        self._changed = changed

    def owe(self, step: int) -> bool:
        """Note that version `step` is to be evaluated; False where it has been, or was waived."""
        with self._db.transaction():
            self._db.execute("INSERT OR IGNORE INTO evaluations VALUES (?, NULL)", (step,))
            return self._db.count("SELECT count(*) FROM evaluations WHERE step = ? AND result IS NULL", (step,)) == 1

    def owed(self) -> list[int]:
        """Steps of the versions whose result is missing, oldest first."""
        with self._db.lock:
            rows = self._db.execute("SELECT step FROM evaluations WHERE result IS NULL ORDER BY step")
            return [step for (step,) in rows]

    def waive(self, step: int) -> bool:
        """Note that version `step` will never be evaluated, where it has not been; whether it was owed until now."""
        with self._db.transaction():
            owed = self._db.execute("UPDATE evaluations SET result = '[]' WHERE step = ? AND result IS NULL", (step,))
            self._db.execute("INSERT OR IGNORE INTO evaluations VALUES (?, '[]')", (step,))
            return owed.rowcount == 1

    def finish(self, step: int, lines: Sequence[Mapping[str, Any]]) -> Outcome:
        """Note a result, a line for each task; the first one counts."""
        with self._db.transaction():
            done = self._db.execute(
                "UPDATE evaluations SET result = ? WHERE step = ? AND result IS NULL", (json.dumps(lines), step)
            )
            self._changed.notify_all()
            return Outcome.COMMITTED if done.rowcount else Outcome.REDELIVERED
