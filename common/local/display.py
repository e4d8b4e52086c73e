"""Where chord-local speaks: a live view on a terminal, plain lines anywhere else."""

import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live

from common.local.screen import View, draw

QUIET_S = 15.0
"""Without a terminal: a line about the present at least this often."""
REFRESH_S = 1.0
"""Between two drawings of the view, where there is no news."""
MAX_NEWS = 100
NUM_LEFT = 20
"""Lines of news that stay on the terminal when the view has gone."""


class Display(Protocol):
    """A context: inside, a run is shown; lines may be said before and after too."""

    def say(self, line: str) -> None: ...

    def say_step(self, line: str) -> None:
        """What a step came to, where trend lines do not tell it."""
        ...

    def show(self) -> None:
        """Bring what is shown up to date; to be called often."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PlainLines:
    """News as it comes, and a line about the present where there is none for long."""

    def __init__(self, console: Console, now: Callable[[], str]) -> None:
        self._console = console
        self._now = now
        self._said = time.monotonic()

    def say(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)
        self._said = time.monotonic()

    def say_step(self, line: str) -> None:
        self.say(line)

    def show(self) -> None:
        if time.monotonic() - self._said > QUIET_S:
            self.say(self._now())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class LiveView:
    """The screen of a terminal, taken for the time of the run and given back at its end."""

    def __init__(self, console: Console, view: Callable[[tuple[str, ...]], View]) -> None:
        """`view` puts together what is shown, given the news."""
        self._console = console
        self._view = view
        self._news: deque[str] = deque(maxlen=MAX_NEWS)
        self._live: Live | None = None
        self._drawn = 0.0

    def say(self, line: str) -> None:
        if not self._live:
            self._console.print(line, markup=False, soft_wrap=True)
            return
        plain = "".join(sign if sign.isprintable() else " " for sign in line)  # as it may come from a log
        self._news.append(f"{time.strftime('%H:%M:%S')} {plain}")
        self._drawn = 0.0

    def say_step(self, line: str) -> None:
        pass

    def show(self) -> None:
        if self._live and time.monotonic() - self._drawn > REFRESH_S:
            width, height = self._console.size
            self._live.update(draw(self._view(tuple(self._news)), width=width, height=height), refresh=True)
            self._drawn = time.monotonic()

    def __enter__(self) -> Self:
        self._live = Live(console=self._console, screen=True, auto_refresh=False)
        self._live.start()
        self.show()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
            self._live = None
        for line in list(self._news)[-NUM_LEFT:]:
            self.say(line)


def can_be_drawn_on(console: Console) -> bool:
    """Whether it is a terminal that knows how to move its cursor."""
    return console.is_terminal and not console.is_dumb_terminal
