"""The feed of a sink: a thread that keeps the sink's delays and faults away from training.

A sink has no memory of its own that counts: at every start of the learner it is given all that the ledger has, and then
what comes. So it shows a step once after a crash, and forgets after a rewind what was taken back.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence

from common.config.run import SinkName
from common.config.schema import Config
from common.run_dir import RunDir
from learner.ledger.ledger import Ledger
from learner.sinks.sink import Point, Sink

log = logging.getLogger(__name__)

MAX_WAITING = 10_000
"""Points that wait for a sink at most; one that falls further behind is left alone."""
CLOSE_S = 30.0
"""Longest wait at the end for what was added to be shown."""


class Feed:
    """One sink's. A sink that fails or falls behind costs one warning, and is given nothing more."""

    def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
        self.name = name
        self.failure = ""
        """Why it is left alone; empty while it is not."""
        self._open_sink = open_sink
        self._waiting: queue.SimpleQueue[Point | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"sink {name}", daemon=True)
        self._past: Sequence[Point] = ()

    def begin(self, past: Sequence[Point]) -> None:
        """Open the sink and give it what is on record; called once."""
        self._past = past
        self._thread.start()

    def add(self, point: Point) -> None:
        """Never waits."""
        if self.failure:
            return
        if self._waiting.qsize() < MAX_WAITING:
            self._waiting.put(point)
        else:
            self._fail(f"it is {MAX_WAITING} points behind")

    def end(self) -> None:
        """Nothing more comes; `join` waits until all has been shown."""
        self._waiting.put(None)

    def join(self, timeout_s: float) -> None:
        if self.failure or not self._thread.is_alive():
            return
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._fail(f"it had not shown the last points within {CLOSE_S:.0f} s")

    def _run(self) -> None:
        try:
            sink = self._open_sink()
            for point in self._past:
                sink.add(point)
            self._past = ()
            while (point := self._waiting.get()) and not self.failure:
                sink.add(point)
            sink.close()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _fail(self, why: str) -> None:
        if self.failure:
            return
        self.failure = why
        log.warning("run.sinks: %s is left alone from now on, training goes on: %s", self.name, why)


class Feeds:
    """Those of all sinks of a run."""

    def __init__(self, feeds: Sequence[Feed] = ()) -> None:
        self._feeds = feeds

    def begin(self, past: Sequence[Point]) -> None:
        for feed in self._feeds:
            feed.begin(past)

    def add(self, point: Point) -> None:
        for feed in self._feeds:
            feed.add(point)

    @property
    def failures(self) -> dict[str, str]:
        """By the sink's name, why it is left alone."""
        return {feed.name: feed.failure for feed in self._feeds if feed.failure}

    def close(self) -> None:
        """Waits for all sinks together."""
        for feed in self._feeds:
            feed.end()
        deadline = time.monotonic() + CLOSE_S
        for feed in self._feeds:
            feed.join(max(deadline - time.monotonic(), 0.0))


def open_feeds(config: Config, run_dir: RunDir, ledger: Ledger) -> Feeds:
    """Those of run.sinks; what they need is imported on their own threads."""
    run_id = f"{ledger.run_id}-{ledger.num_rewinds}" if ledger.num_rewinds else ledger.run_id
    openers = {
        SinkName.TENSORBOARD: lambda: _open_tensorboard(run_dir),
        SinkName.WANDB: lambda: _open_wandb(config, run_dir, run_id),
    }
    return Feeds([Feed(name, openers[name]) for name in dict.fromkeys(config.run.sinks)])


def _open_tensorboard(run_dir: RunDir) -> Sink:
    from learner.sinks.tensorboard import TensorBoard

    return TensorBoard(run_dir.sink(SinkName.TENSORBOARD))


def _open_wandb(config: Config, run_dir: RunDir, run_id: str) -> Sink:
    from learner.sinks.wandb import WeightsAndBiases

    folder, values = run_dir.sink(SinkName.WANDB), config.model_dump(mode="json")
    return WeightsAndBiases(folder, run_id=run_id, name=run_dir.path.name, config=values)
