"""Means over a few seeds, their standard errors, and differences between runs that saw the same batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

T_975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
"""Quantile 0.975 of Student's t with 1, 2, … degrees of freedom."""
NORMAL_975 = 1.95996


@dataclass(frozen=True)
class Estimate:
    """The mean of some values and how sure it is."""

    mean: float
    error: float | None
    """Standard error: sample standard deviation / sqrt(count); None for a single value."""
    low: float | None
    """Limits of the 95 % interval by Student's t; None for a single value."""
    high: float | None
    count: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of at least one value."""
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, None, None, 1)
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    reach = t_975(count - 1) * error
    return Estimate(mean, error, mean - reach, mean + reach, count)


def paired_difference(values: Mapping[int, float], reference: Mapping[int, float]) -> Estimate | None:
    """The mean of value - reference over the seeds that both have; None without any."""
    differences = [values[seed] - reference[seed] for seed in values if seed in reference]
    return estimate(differences) if differences else None


def t_975(freedom: int) -> float:
    """Quantile 0.975 of Student's t; beyond the table by its expansion around the normal distribution."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z = NORMAL_975
    terms = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))
