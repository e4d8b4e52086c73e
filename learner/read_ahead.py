"""The read-ahead: reads the rows of the next step while this one is taken. It decides nothing.

Consumes a draft of the next composition; waits for it in the background, as long as the train loop is busy otherwise;
is unblocked by the ledger's changes, or by the train loop, which has the limits; produces rows that count only where
the composition which is then cut is the one that was drafted.
"""

import threading
from collections.abc import Callable

from learner.ledger.history import Composition
from learner.step_rows import StepRows

LOOK_S = 0.5
"""Between two looks at a ledger that says nothing."""


class ReadAhead:
    """One step at a time, in a thread of its own. `begin` and `end` are the train loop's."""

    def __init__(
        self,
        changed: threading.Condition,
        draft: Callable[[int], Composition | None],
        read: Callable[[Composition], StepRows],
    ) -> None:
        """`draft` says what a step would be made of now, None while something is missing; it is asked under `changed`,
        whenever that is notified."""
        self._changed = changed
        self._draft = draft
        self._read = read
        self._is_wanted = False
        self._rows: StepRows | None = None
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def begin(self, step: int) -> None:
        """Read `step` as soon as it can be drafted. The one before must have ended."""
        self._is_wanted = True
        self._thread = threading.Thread(target=self._work, args=(step,), name="read-ahead", daemon=True)
        self._thread.start()

    def end(self) -> StepRows | None:
        """What was read, at the end of a reading in progress; None where there was nothing to read yet.

        Raises what the reading raised.
        """
        self.close()
        rows, failure = self._rows, self._failure
        self._rows = self._failure = None
        if failure:
            raise failure
        return rows

    def close(self) -> None:
        """Read no further, so that ledger and store can be closed."""
        if self._thread:
            with self._changed:
                self._is_wanted = False
                self._changed.notify_all()
            self._thread.join()
            self._thread = None

    def _work(self, step: int) -> None:
        try:
            if draft := self._wait_for_draft(step):
                self._rows = self._read(draft)
        except Exception as error:  # the train loop raises it
            self._failure = error

    def _wait_for_draft(self, step: int) -> Composition | None:
        with self._changed:
            while self._is_wanted:
                if draft := self._draft(step):
                    return draft
                self._changed.wait(LOOK_S)
        return None
