"""Best-fit-decreasing packing of many lengths at once, in two ways. Pure and exact, by groups of equal packs.

Plain best-fit-decreasing fills a pack with items of nearly the same length, often all of one source: poor batches where
a step has few packs. So the longer items first go, one by one, to the emptiest of as many packs as must be there, which
gives each pack its share of every length; the rest closes the gaps by best fit. Where that leaves more than 1 % empty,
plain best-fit-decreasing is tried, and taken where it saves more than one pack.
"""

from __future__ import annotations

import numpy as np

GOOD_FILL = 0.99
"""Spread packs this full are taken without trying plain best-fit-decreasing."""
SPREAD = 0.75
"""Fraction of the tokens, longest items first, that is spread evenly over the packs."""

_Placements = list[tuple[int, int, int]]


def pack_lengths(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """(pack number of each item int64, number of packs) for lengths in [1, capacity]; ties keep the given order."""
    placements, num_packs = _best_placements(lengths, capacity)
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    pack_of_item = np.empty(len(lengths), dtype=np.int64)
    if len(lengths):
        first, packs, each = np.asarray(placements, dtype=np.int64).T
        moved = packs * each  # items of a placement
        within = np.arange(len(lengths)) - np.repeat(np.cumsum(moved) - moved, moved)
        pack_of_item[order] = np.repeat(first, moved) + within // np.repeat(each, moved)
    return pack_of_item, num_packs


def count_packs(lengths: np.ndarray, capacity: int) -> int:
    """Only the number of packs that `pack_lengths` makes."""
    return _best_placements(lengths, capacity)[1]


def _best_placements(lengths: np.ndarray, capacity: int) -> tuple[_Placements, int]:
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= capacity), "lengths outside [1, capacity]"
    counts = np.bincount(lengths) if len(lengths) else np.zeros(1, dtype=np.int64)
    present = np.flatnonzero(counts)[::-1]
    groups = list(zip(present.tolist(), counts[present].tolist(), strict=True))
    total = sum(length * count for length, count in groups)
    spread = _place(groups, capacity, total * SPREAD, -(-total // capacity))
    if total >= GOOD_FILL * spread[1] * capacity:
        return spread
    plain = _place(groups, capacity, 0, 0)
    return plain if plain[1] + 1 < spread[1] else spread


def _place(
    groups: list[tuple[int, int]], capacity: int, spread_tokens: float, num_packs: int
) -> tuple[_Placements, int]:
    """Placements (first pack, number of packs, items in each) of items, longest first, and the number of packs.

    `groups` are (length, number of items), longest first. The first `spread_tokens` tokens go to the emptiest of
    `num_packs` packs, one item at a time; later items to the tightest pack that holds them. An item that fits nowhere
    opens a pack.
    """
    runs: dict[int, list[tuple[int, int]]] = {}  # room left -> runs of (first pack, number of packs)
    rooms = 0  # bit r is set when some pack has room r
    if num_packs:
        runs[capacity] = [(0, num_packs)]
        rooms = 1 << capacity
    placements: _Placements = []
    placed = 0
    for length, left in groups:
        while left:
            fitting = rooms >> length
            if not fitting:
                new = max(left // (capacity // length), 1)
                runs.setdefault(capacity, []).append((num_packs, new))
                rooms |= 1 << capacity
                num_packs += new
                continue
            if placed < spread_tokens:  # the emptiest
                room, each = rooms.bit_length() - 1, 1
            else:  # the tightest stays the tightest while it takes more items of this length
                room = length + (fitting & -fitting).bit_length() - 1
                each = min(room // length, left)
            at_room = runs[room]
            first, packs = at_room.pop()
            take = min(packs, left // each)
            placements.append((first, take, each))
            left -= take * each
            placed += take * each * length
            if take < packs:
                at_room.append((first + take, packs - take))
            elif not at_room:
                rooms &= ~(1 << room)
            rest = room - each * length
            if rest:
                runs.setdefault(rest, []).append((first, take))
                rooms |= 1 << rest
    return placements, num_packs
