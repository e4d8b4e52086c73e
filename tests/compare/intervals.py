"""Means with 90 % intervals. Pure functions of numbers.

The unit of replication is the seed: a run with another seed has other prompts, other sampling, another order of
expert rows and other test problems, so that the spread between seeds holds every source of chance there is. The
interval of a mean over seeds is Student's t with n − 1 degrees of freedom. A bootstrap over three seeds would be too
narrow: the spread of n resampled values is too small by √((n−1)/n), and its quantiles are a normal's, 1.64 where 2.92
is due. Differences are taken within a seed, where both runs were tested on the same problems, and are then values over
seeds like others.

One seed alone has no spread. For a difference there is then an interval over problems, which holds the chance of
problems and answers but not that of training; whoever shows it says so.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.9
T_95 = (
    6.3138, 2.9200, 2.3534, 2.1318, 2.0150, 1.9432, 1.8946, 1.8595, 1.8331, 1.8125,
    1.7959, 1.7823, 1.7709, 1.7613, 1.7531, 1.7459, 1.7396, 1.7341, 1.7291, 1.7247,
)  # fmt: skip
"""95 % quantiles of Student's t with 1, 2, … degrees of freedom; above 20 the last one serves, on the safe side."""
NORMAL_95 = 1.6449


@dataclass(frozen=True)
class Interval:
    """A mean and how far off it may be."""

    mean: float
    half_width: float | None
    """None where a single value tells nothing of it."""
    num: int
    """Seeds, or problems, that it is taken over."""

    @property
    def low(self) -> float | None:
        return None if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float | None:
        return None if self.half_width is None else self.mean + self.half_width

    def lies_within(self, bound: float) -> bool | None:
        """Whether all of it is nearer to 0 than `bound`; None where it has no ends."""
        return None if self.low is None or self.high is None else -bound < self.low and self.high < bound


def over_seeds(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean of one value for each seed."""
    num = len(values)
    if num < 2:
        return Interval(values[0], None, 1)
    spread = statistics.stdev(values) / math.sqrt(num)
    return Interval(statistics.fmean(values), T_95[min(num - 1, len(T_95)) - 1] * spread, num)


def paired_over_seeds(ours: Mapping[int, float], others: Mapping[int, float]) -> Interval | None:
    """Of ours − the other's, over the seeds that both have; None where there is none."""
    differences = [ours[seed] - others[seed] for seed in sorted(ours.keys() & others.keys())]
    return over_seeds(differences) if differences else None


def paired_over_problems(ours: Sequence[float], others: Sequence[float]) -> Interval:
    """Of ours − the other's, one value for each problem, in the same order; normal, as problems are many."""
    differences = [our - other for our, other in zip(ours, others, strict=True)]
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return Interval(statistics.fmean(differences), NORMAL_95 * spread, len(differences))
