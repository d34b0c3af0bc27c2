"""The mixture: how many samples of each source an epoch has, exactly, and how they spread over its blocks.

An epoch is the shortest one in which every source is seen whole at least once: the source that lasts longest at its
weight is seen exactly once, and the others are drawn in proportion. A source that runs out early starts its next pass,
in a new order. Passes continue across epochs, so two samples of a source are never seen more than one time apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.order.hashing import grouped_permutation, hash_key

MAX_SAMPLES = 10**10
"""Most samples of an epoch: its blocks and windows are counted in memory."""


def epoch_draws(sizes: Mapping[str, int], mixture: Mapping[str, float]) -> dict[str, int]:
    """Samples that each source gives to one epoch, in the order of `mixture`.

    `sizes` counts usable samples. With one source, or weights in proportion to sizes, every sample comes exactly once.
    """
    if not mixture:
        raise DataError("the mixture is empty: name at least one source and its weight")
    for name, weight in mixture.items():
        if name not in sizes:
            raise DataError(f"mixture: source {name!r} is not among the sources ({', '.join(sizes)})")
        if not 0 < weight < float("inf"):
            raise DataError(
                f"mixture: weight {weight!r} of source {name!r} must be a positive number; "
                "remove sources without weight"
            )
        if sizes[name] < 1:
            raise DataError(f"source {name!r} has no usable sample")
    weights = {name: Fraction(str(weight)) for name, weight in mixture.items()}
    lead = max(weights, key=lambda name: (Fraction(sizes[name]) / weights[name], name))
    unit = Fraction(sizes[lead]) / weights[lead]
    draws = {name: max(1, int(unit * weight + Fraction(1, 2))) for name, weight in weights.items()}
    if sum(draws.values()) > MAX_SAMPLES:
        raise DataError(
            f"mixture: an epoch would have {sum(draws.values()):,} samples, more than {MAX_SAMPLES:,}, until "
            f"{lead!r} is seen whole: make the weights more alike"
        )
    return draws


def block_quotas(draws: np.ndarray, block: int) -> np.ndarray:
    """int64 [blocks + 1, sources]: samples of each source before each block of `block` samples, and the epoch's totals.

    After every block each source has had its exact share, rounded down or up: the share that falls due first is rounded
    up (earliest deadline first, which always fits: the fractional shares themselves are a schedule).
    """
    total = int(draws.sum())
    num_blocks = -(-total // block)
    if len(draws) == 1:
        return np.minimum(np.arange(num_blocks + 1, dtype=np.int64) * block, total)[:, None]
    counts = draws.tolist()
    used = [0] * len(counts)
    rows = [used]
    for number in range(1, num_blocks + 1):
        end = min(number * block, total)
        due = [end * count // total for count in counts]
        following = [max(have, floor) for have, floor in zip(used, due, strict=True)]
        open_slots = end - sum(following)
        if open_slots:
            early = [
                (-(-(have + 1) * total // counts[i]), i)
                for i, have in enumerate(following)
                if have == due[i] and end * counts[i] > due[i] * total
            ]
            for _, i in sorted(early)[:open_slots]:
                following[i] += 1
        rows.append(following)
        used = following
    return np.asarray(rows, dtype=np.int64)


def block_slots(quotas: np.ndarray, first: int, last: int, seed: int, epoch: int) -> np.ndarray:
    """Source number of every sample slot of blocks [first, last), shuffled inside each block; int64 [slots]."""
    per_block = np.diff(quotas[first : last + 1], axis=0)  # [blocks, sources]
    num_blocks, num_sources = per_block.shape
    ordered = np.repeat(np.tile(np.arange(num_sources), num_blocks), per_block.reshape(-1))
    if num_sources == 1:
        return ordered
    sizes = per_block.sum(axis=1)
    blocks = np.repeat(np.arange(first, last), sizes)
    slots = quotas[first].sum() + np.arange(len(ordered))
    return ordered[grouped_permutation(hash_key(seed, "mix", epoch), blocks, slots)]
