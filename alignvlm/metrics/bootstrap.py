"""Confidence intervals of scores: items are drawn again with replacement, by a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SAMPLES = 1000
LEVEL = 0.95


def confidence_interval(contributions: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """Lower and upper limit of a score by the percentile bootstrap over items.

    Args:
        contributions: what each item adds to the sums that the score is made of, [items, k]: for a mean its value
            and 1, for an F1 its hits and counts.
        score: sums [SAMPLES, k] -> scores [SAMPLES].

    Raises:
        ValueError: there are no items.
    """
    import numpy as np

    num_items = len(contributions)
    if num_items == 0:
        raise ValueError("there is no item to draw from")
    generator = np.random.default_rng(0)  # equal arguments give equal limits
    sums = np.empty((SAMPLES, contributions.shape[1]))
    for row in range(SAMPLES):
        counts = np.bincount(generator.integers(num_items, size=num_items), minlength=num_items)
        sums[row] = counts @ contributions
    low, high = np.quantile(score(sums), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
