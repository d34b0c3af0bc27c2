"""Packing: valid, full on lengths like DocVQA's, and mixed."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.order.packing import _place, count_packs, pack_lengths


def naive_rooms(lengths: list[int], capacity: int, spread_tokens: float, num_packs: int) -> list[int]:
    """Room left in each pack when items are placed one by one, longest first."""
    rooms = [capacity] * num_packs
    placed = 0
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            room = max(fitting) if placed < spread_tokens else min(fitting)
            rooms.remove(room)
            rooms.append(room - length)
        else:
            rooms.append(capacity - length)
        placed += length
    return sorted(rooms)


@given(st.lists(st.integers(1, 40), max_size=120), st.integers(40, 97))
def test_packs_are_valid_and_nearly_as_few_as_best_fit_decreasing(lengths: list[int], capacity: int) -> None:
    items = np.asarray(lengths, dtype=np.int64)
    pack_of, num_packs = pack_lengths(items, capacity)
    filled = np.bincount(pack_of, weights=items, minlength=num_packs)
    assert len(filled) == num_packs == count_packs(items, capacity)
    assert (filled <= capacity).all()
    assert (filled > 0).all()
    assert num_packs <= max(len(naive_rooms(lengths, capacity, 0, 0)) + 1, sum(lengths) / capacity / 0.99)


@given(st.lists(st.sampled_from([1, 2, 3, 5, 8, 13, 21, 34]), min_size=1, max_size=80))
def test_groups_equal_items_one_by_one(lengths: list[int]) -> None:
    """Equal items are spread one by one, so only whole groups are compared: all spread, or none."""
    counts = sorted(Counter(lengths).items(), reverse=True)
    for spread, packs in ((0, 0), (10**9, -(-sum(lengths) // 50))):
        placements, num_packs = _place(counts, 50, spread, packs)
        items = sorted(lengths, reverse=True)
        rooms = [50] * num_packs
        for first, number, each in placements:
            for pack in range(first, first + number):
                for _ in range(each):
                    rooms[pack] -= items.pop(0)
        assert sorted(rooms) == naive_rooms(lengths, 50, spread, packs)


def test_fill_on_lengths_like_docvqa() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(7.3, 0.45, 65536), 300, 8192).astype(np.int64)
    _, num_packs = pack_lengths(lengths, 8192)
    assert lengths.sum() / (num_packs * 8192) > 0.99


def test_packs_mix_lengths() -> None:
    """Of short and long items every pack gets some of both, though plain best-fit-decreasing would sort them apart."""
    lengths = np.repeat([20, 40], 2000)
    pack_of, num_packs = pack_lengths(lengths, 1000)
    long_items = np.bincount(pack_of[lengths == 40], minlength=num_packs)
    assert long_items.min() > 0
    assert long_items.max() < 25
