"""Trend lines: how a number of the run went, in one row of blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from common.local.record import EvaluationLine, StepLine

BLOCKS = "▁▂▃▄▅▆▇█"
MAX_KEPT = 512
"""Values that one trend keeps; no screen is wider than half of it."""


class Series:
    """A number over a run of any length: when its values become too many, neighbours become their mean."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        """Step and value, oldest first."""
        self.last: float | None = None
        """May be NaN or infinite, which no block can show."""
        self._per_point = 1
        """How many values each of `points` is the mean of; the last one may be of fewer."""
        self._num_in_last = 0

    def add(self, step: int, value: float) -> None:
        self.last = value
        if not math.isfinite(value):
            return
        if self.points and self._num_in_last < self._per_point:
            self._num_in_last += 1
            mean = self.points[-1][1]
            self.points[-1] = step, mean + (value - mean) / self._num_in_last
            return
        if len(self.points) == MAX_KEPT:
            pairs = zip(self.points[::2], self.points[1::2], strict=True)
            self.points = [(step_b, (a + b) / 2) for (_, a), (step_b, b) in pairs]
            self._per_point *= 2
        self.points.append((step, value))
        self._num_in_last = 1

    @property
    def scale(self) -> tuple[float, float]:
        """The least and the greatest value."""
        values = [value for _, value in self.points] or [0.0]
        return min(values), max(values)


def draw_trend(points: Sequence[tuple[int, float]], *, last_step: int, width: int, scale: tuple[float, float]) -> str:
    """One block for each share of the steps from 0 to `last_step`, `width` of them at most: the mean of its values.

    Where a share has none the one before goes on, so that all lines have the same axis. `scale`: lowest, highest block.
    """
    num_blocks = max(min(last_step + 1, width), 1)
    shares: list[list[float]] = [[] for _ in range(num_blocks)]
    for step, value in points:
        shares[min(step * num_blocks // (last_step + 1), num_blocks - 1)].append(value)
    drawn, block, (low, high) = "", " ", scale
    for share in shares:
        if share and high > low:
            height = (sum(share) / len(share) - low) / (high - low)
            block = BLOCKS[min(max(int(height * len(BLOCKS)), 0), len(BLOCKS) - 1)]
        elif share:
            block = BLOCKS[len(BLOCKS) // 2]
        drawn += block
    return drawn


@dataclass(frozen=True)
class Trend:
    """A row of the view."""

    label: str
    field: str
    """Of StepLine."""
    form: str = ".3f"
    scale: tuple[float, float] | None = None
    """None: from its least to its greatest value."""


IS_SHARE = (0.0, 1.0)
ACCURACY = Trend("held-out accuracy", "accuracy")
TRENDS = (
    Trend("reward", "reward_mean"),
    ACCURACY,
    Trend("μ", "mu"),
    Trend("policy loss", "policy_loss", ".4f"),
    Trend("expert loss", "expert_loss", ".4f"),
    Trend("learner idle", "learner_wait_frac", ".0%", IS_SHARE),
    Trend("actors idle", "actor_idle_frac", ".0%", IS_SHARE),
    Trend("staleness", "staleness_mean", ".1f"),
    Trend("entropy", "policy_entropy"),
    Trend("answer tokens", "answer_tokens_mean", ".0f"),
    Trend("with signal", "groups_with_signal_frac", ".0%", IS_SHARE),
    Trend("gradient norm", "grad_norm", ".3g"),
    Trend("sampled/s", "actor_tokens_per_s", ".0f"),
    Trend("trained/s", "learner_tokens_per_s", ".0f"),
    Trend("step, s", "step_s", ".1f"),
)
"""What matters most comes first: a small screen shows the first ones."""


class Trends:
    """All trends of a run."""

    def __init__(self) -> None:
        self._of_steps = {trend.field: Series() for trend in TRENDS if trend is not ACCURACY}
        self._of_tasks: dict[str, Series] = {}

    def add_step(self, line: StepLine) -> None:
        for field, series in self._of_steps.items():
            value: float | None = getattr(line, field)
            if value is not None:
                series.add(line.step, value)

    def add_evaluation(self, line: EvaluationLine) -> None:
        self._of_tasks.setdefault(line.task, Series()).add(line.step, line.accuracy)

    def rows(self) -> list[tuple[Trend, str, Series]]:
        """Trend, label and values of all that have any."""
        found: list[tuple[Trend, str, Series]] = []
        for trend in TRENDS:
            if trend is ACCURACY:
                is_only = len(self._of_tasks) == 1
                for task, series in self._of_tasks.items():
                    found.append((trend, trend.label if is_only else task, series))
            else:
                found.append((trend, trend.label, self._of_steps[trend.field]))
        return [row for row in found if row[2].last is not None]
