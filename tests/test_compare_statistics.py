"""The statistics of `make compare` against known answers."""

import math

import numpy as np
import pytest

from tests.compare.intervals import (
    CONFIDENCE,
    NORMAL_95,
    T_95,
    Interval,
    over_seeds,
    paired_over_problems,
    paired_over_seeds,
)


def probability_within(limit: float, *, freedom: int) -> float:
    """Of Student's t between −limit and limit, by summing up its density."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    t = np.linspace(-limit, limit, 200_001)
    return float(np.trapezoid(scale * (1 + t**2 / freedom) ** (-(freedom + 1) / 2), t))


@pytest.mark.parametrize("freedom", range(1, len(T_95) + 1))
def test_the_quantiles_of_t_hold_as_much_as_they_say(freedom: int) -> None:
    assert probability_within(T_95[freedom - 1], freedom=freedom) == pytest.approx(CONFIDENCE, abs=1e-5)


def test_the_normal_quantile_holds_as_much_too() -> None:
    assert math.erf(NORMAL_95 / math.sqrt(2)) == pytest.approx(CONFIDENCE, abs=1e-4)


def test_three_seeds_have_the_interval_that_a_textbook_gives() -> None:
    found = over_seeds([0.50, 0.60, 0.55])  # s = 0.05, s/√3 = 0.028868, t(0.95; 2) = 2.9200
    assert (found.mean, found.half_width, found.num) == (pytest.approx(0.55), pytest.approx(0.084293, abs=1e-6), 3)
    assert (found.low, found.high) == (pytest.approx(0.465707), pytest.approx(0.634293))


def test_one_seed_has_no_interval_and_lies_within_nothing() -> None:
    found = over_seeds([0.5])
    assert (found.half_width, found.low, found.lies_within(1.0)) == (None, None, None)


def test_nine_in_ten_intervals_of_three_seeds_hold_the_truth() -> None:
    numbers = np.random.default_rng(0).normal(0.4, 0.1, (4000, 3))
    found = [over_seeds(row.tolist()) for row in numbers]
    share = np.mean([interval.low <= 0.4 <= interval.high for interval in found])
    assert share == pytest.approx(CONFIDENCE, abs=0.015)


def test_a_difference_is_taken_within_each_seed_that_both_have() -> None:
    found = paired_over_seeds({0: 0.5, 1: 0.7, 2: 0.9}, {0: 0.4, 1: 0.6, 3: 0.0})
    assert found
    assert (found.mean, found.num) == (pytest.approx(0.1), 2)
    assert found.half_width == pytest.approx(0.0, abs=1e-12)  # the seeds differ, the difference does not
    assert paired_over_seeds({0: 0.5}, {1: 0.5}) is None


def test_problems_that_both_solve_make_no_chance() -> None:
    found = paired_over_problems([1.0] * 90 + [1.0, 0.0] * 5, [1.0] * 90 + [0.0, 0.0] * 5)
    # 5 of 100 differ by 1: mean 0.05, s = √(0.05·0.95·100/99) = 0.219043, half width 1.6449·s/10
    assert (found.mean, found.half_width) == (pytest.approx(0.05), pytest.approx(0.036030, abs=1e-5))


def test_an_interval_lies_within_a_bar_only_with_both_ends() -> None:
    assert Interval(0.01, 0.03, 3).lies_within(0.05) is True
    assert Interval(0.03, 0.03, 3).lies_within(0.05) is False
    assert Interval(-0.03, 0.03, 3).lies_within(0.05) is False
