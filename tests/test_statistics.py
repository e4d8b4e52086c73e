"""The statistics of an evaluation, against hand-computed numbers and a count over every subset."""

from itertools import combinations
from math import comb

import numpy as np
import pytest

from actors.evaluator.statistics import (
    accuracy_by_category,
    avg_at_k,
    bootstrap_interval,
    mean_pass_at_k,
    pass_at_k,
    pass_sizes,
)


def test_avg_at_k_is_the_mean_over_problems_of_the_share_of_right_samples() -> None:
    assert avg_at_k([4, 1, 0, 2], 4) == pytest.approx(7 / 16)
    assert avg_at_k([1, 0, 1], 1) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("num_samples", "num_right", "k", "expected"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # 3 of the 6 pairs hold the right one
        (4, 2, 2, 5 / 6),
        (5, 2, 3, 9 / 10),  # 1 of 10 triples misses both
        (10, 3, 1, 3 / 10),
        (8, 0, 8, 0.0),
        (8, 1, 8, 1.0),
        (3, 3, 1, 1.0),
    ],
)
def test_pass_at_k_gives_numbers_worked_out_by_hand(num_samples: int, num_right: int, k: int, expected: float) -> None:
    assert pass_at_k(num_samples, num_right, k) == pytest.approx(expected)


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_right_sample(num_samples: int) -> None:
    for num_right in range(num_samples + 1):
        for k in range(1, num_samples + 1):
            subsets = list(combinations(range(num_samples), k))
            share = sum(any(sample < num_right for sample in subset) for subset in subsets) / len(subsets)
            assert pass_at_k(num_samples, num_right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_is_exact_where_binomials_are_too_large_for_a_float() -> None:
    exact = 1 - comb(4096 - 3, 1000) / comb(4096, 1000)
    assert pass_at_k(4096, 3, 1000) == pytest.approx(exact, rel=1e-10)


def test_pass_at_k_is_unbiased_where_the_plug_in_estimate_is_not() -> None:
    chance, num_samples, k = 0.3, 6, 4
    weights = [comb(num_samples, c) * chance**c * (1 - chance) ** (num_samples - c) for c in range(num_samples + 1)]
    truth = 1 - (1 - chance) ** k
    ours = sum(w * pass_at_k(num_samples, c, k) for c, w in enumerate(weights))
    plug_in = sum(w * (1 - (1 - c / num_samples) ** k) for c, w in enumerate(weights))
    assert ours == pytest.approx(truth, abs=1e-12)
    assert plug_in < truth - 0.01


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_of_more_samples_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"pass@k: got k = {k}, expected 1 to the number of samples \(4\)"):
        pass_at_k(4, 1, k)


def test_pass_at_k_of_a_benchmark_is_the_mean_over_its_problems() -> None:
    assert mean_pass_at_k([4, 1, 0, 2], 4, 2) == pytest.approx((1 + 1 / 2 + 0 + 5 / 6) / 4)
    assert mean_pass_at_k([4, 1, 0, 2], 4, 1) == pytest.approx(avg_at_k([4, 1, 0, 2], 4))


@pytest.mark.parametrize(
    ("num_samples", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (32, [1, 2, 4, 8, 16, 32])]
)
def test_pass_is_reported_for_powers_of_two_and_for_all_samples(num_samples: int, expected: list[int]) -> None:
    assert list(pass_sizes(num_samples)) == expected


def test_the_interval_is_that_of_the_normal_approximation_where_problems_are_many() -> None:
    values = [1.0] * 300 + [0.0] * 700
    low, high = bootstrap_interval(values, seed=0)
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == (pytest.approx(0.3 - half, abs=0.004), pytest.approx(0.3 + half, abs=0.004))


def test_the_interval_is_that_of_all_resamples_where_problems_are_few() -> None:
    values = [0.0, 0.2, 0.6, 1.0]
    means = sorted((a + b + c + d) / 4 for a in values for b in values for c in values for d in values)
    low, high = bootstrap_interval(values, seed=1)
    assert low == pytest.approx(means[round(0.025 * 256)], abs=1e-9)
    assert high == pytest.approx(means[round(0.975 * 256) - 1], abs=1e-9)


def test_the_interval_repeats_with_its_seed_and_has_no_width_where_all_are_alike() -> None:
    values = [0.0, 0.25, 1.0, 0.5, 0.75] * 7
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval([1.0] * 5, seed=0) == (1.0, 1.0)


def test_a_category_has_the_mean_of_its_own_problems() -> None:
    found = accuracy_by_category(["law", "", "law", "art"], [1.0, 0.0, 0.5, 0.25])
    assert found == {"art": 0.25, "law": 0.75}
