"""Means, standard errors, paired differences and Student's t against numpy and scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from alignvlm.studies.results.statistics import estimate, paired_difference, t_975


def test_mean_error_and_interval_are_those_of_scipy() -> None:
    values = [0.714, 0.702, 0.735, 0.69]
    found = estimate(values)
    assert found.mean == pytest.approx(np.mean(values), rel=1e-12)
    assert found.error == pytest.approx(stats.sem(values), rel=1e-12)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))
    assert estimate([0.5]).to_dict() == {"mean": 0.5, "error": None, "low": None, "high": None, "count": 1}


@pytest.mark.parametrize("freedom", [1, 2, 7, 30, 31, 60, 1000])
def test_quantiles_of_students_t(freedom: int) -> None:
    assert t_975(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=6e-5)


def test_differences_are_paired_by_seed() -> None:
    """Seeds that differ much and variants that differ little: what pairing is for."""
    ours, theirs = {0: 0.9, 1: 0.3, 2: 0.62, 4: 0.1}, {2: 0.6, 1: 0.28, 0: 0.89, 3: 0.7}
    found = paired_difference(ours, theirs)
    pairs = np.array([[ours[seed], theirs[seed]] for seed in (0, 1, 2)])
    test = stats.ttest_rel(pairs[:, 0], pairs[:, 1])
    assert found is not None
    assert found.mean == pytest.approx((pairs[:, 0] - pairs[:, 1]).mean())
    assert found.mean / found.error == pytest.approx(test.statistic)
    assert found.error < 0.01 < estimate([0.9, 0.3, 0.62]).error
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
