"""The numbers of an evaluation: avg@k, unbiased pass@k, bootstrap intervals. Pure functions of right and wrong.

`num_right` is [P]: of each of P problems, how many of its n samples are right.
"""

from collections.abc import Iterator, Sequence

import numpy as np

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
"""Draws of a bootstrap: the ends of its interval then move by about a tenth of its width from seed to seed."""
CHUNK_RESAMPLES = 100
"""Draws at a time, so that 12,000 problems need 10 MB and not 200."""


def avg_at_k(num_right: Sequence[int], k: int) -> float:
    """avg@k: the mean over problems of the share of their k samples that is right."""
    return float(np.mean(np.asarray(num_right) / k))


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The probability that one of k samples, drawn without replacement from n of which c are right, is right.

    1 − C(n−c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374), as the product 1 − Π_{i=n−c+1}^{n} (1 − k/i), in which
    nothing grows large. Over fresh samples its mean is the true pass@k; 1 − (1 − c/n)^k would be too small.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@k: got k = {k}, expected 1 to the number of samples ({num_samples})")
    if num_samples - num_right < k:
        return 1.0
    failing = np.arange(num_samples - num_right + 1, num_samples + 1)
    return float(1.0 - np.prod(1.0 - k / failing))


def mean_pass_at_k(num_right: Sequence[int], num_samples: int, k: int) -> float:
    """pass@k of a benchmark: the mean over its problems."""
    of_count = [pass_at_k(num_samples, right, k) for right in range(num_samples + 1)]
    return float(np.mean([of_count[right] for right in num_right]))


def pass_sizes(num_samples: int) -> Iterator[int]:
    """The k that are reported of n samples: powers of two, and n."""
    k = 1
    while k < num_samples:
        yield k
        k *= 2
    yield num_samples


def bootstrap_interval(values: Sequence[float], *, seed: int) -> tuple[float, float]:
    """Percentile interval (95 %) of the mean of `values`, one for each problem; problems are drawn with replacement.

    It tells how far the mean would move with other problems of the same kind, samples included. One problem alone
    gives an interval of no width, which says nothing.
    """
    found = np.asarray(values, dtype=np.float64)
    random = np.random.default_rng(seed)
    means = [
        found[random.integers(0, len(found), (CHUNK_RESAMPLES, len(found)))].mean(axis=1)
        for _ in range(NUM_RESAMPLES // CHUNK_RESAMPLES)
    ]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def accuracy_by_category(categories: Sequence[str], accuracies: Sequence[float]) -> dict[str, float]:
    """The mean accuracy of the problems of each category, by name; problems without one are left out."""
    found: dict[str, list[float]] = {}
    for category, accuracy in zip(categories, accuracies, strict=True):
        if category:
            found.setdefault(category, []).append(accuracy)
    return {category: float(np.mean(found[category])) for category in sorted(found)}
