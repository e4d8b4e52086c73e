"""How far an evaluation has come: a bar where somebody looks, else a line now and then."""

import logging
import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far the task under way has come."""

    task: str
    num_done: int
    num_answers: int


class Reports:
    """Lines in the log, `every_s` at most."""

    def __init__(self, subject: str, *, every_s: float) -> None:
        self._subject = subject
        self._every_s = every_s
        self._reported = time.monotonic()

    def note(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self._reported > self._every_s:
            self._reported = now
            log.info("%s: %s: %d of %d answers", self._subject, progress.task, progress.num_done, progress.num_answers)


class ProgressBars:
    """On a terminal's standard error, a bar for each task."""

    def __init__(self, console: Console) -> None:
        self._bars = Bars(console=console)
        self._ids: dict[str, TaskID] = {}

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def note(self, progress: Progress) -> None:
        if progress.task not in self._ids:
            self._ids[progress.task] = self._bars.add_task(progress.task, total=progress.num_answers)
        self._bars.update(self._ids[progress.task], completed=progress.num_done)
