"""Best-fit-decreasing packing of many lengths at once. Pure and exact: the same as placing item by item, but by groups.

Items of one length go together: the tightest open pack that holds an item stays the tightest while it takes more of
them, so whole runs of equal packs are filled in one move. 64K lengths take tens of milliseconds.
"""

from __future__ import annotations

import numpy as np


def pack_lengths(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """(pack number of each item int64, number of packs). Lengths must lie in [1, capacity]; ties keep the given
    order.
    """
    placements, order, num_packs = _place(lengths, capacity)
    pack_of_item = np.empty(len(lengths), dtype=np.int64)
    if len(lengths):
        first, packs, each = np.asarray(placements, dtype=np.int64).T
        moved = packs * each  # items of a placement
        within = np.arange(len(lengths)) - np.repeat(np.cumsum(moved) - moved, moved)
        pack_of_item[order] = np.repeat(first, moved) + within // np.repeat(each, moved)
    return pack_of_item, num_packs


def count_packs(lengths: np.ndarray, capacity: int) -> int:
    """Only the number of packs that `pack_lengths` makes."""
    return _place(lengths, capacity)[2]


def _place(lengths: np.ndarray, capacity: int) -> tuple[list[tuple[int, int, int]], np.ndarray, int]:
    """Placements (first pack, number of packs, items in each) in the order of the items, longest first, and that
    order.
    """
    assert len(lengths) == 0 or (lengths.min() > 0 and lengths.max() <= capacity), "lengths outside [1, capacity]"
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    counts = np.bincount(lengths) if len(lengths) else np.zeros(1, dtype=np.int64)
    present = np.flatnonzero(counts)[::-1]
    runs: dict[int, list[tuple[int, int]]] = {}  # room left -> runs of (first pack, number of packs)
    rooms = 0  # bit r is set when some pack has room r
    placements: list[tuple[int, int, int]] = []
    num_packs = 0
    for length, left in zip(present.tolist(), counts[present].tolist(), strict=True):
        while left:
            fitting = rooms >> length
            if not fitting:
                each = capacity // length
                new = max(left // each, 1)
                runs.setdefault(capacity, []).append((num_packs, new))
                rooms |= 1 << capacity
                num_packs += new
                room = capacity
            else:
                room = length + (fitting & -fitting).bit_length() - 1
            at_room = runs[room]
            first, packs = at_room.pop()
            each = min(room // length, left)
            take = min(packs, left // each)
            placements.append((first, take, each))
            left -= take * each
            if take < packs:
                at_room.append((first + take, packs - take))
            elif not at_room:
                rooms &= ~(1 << room)
            rest = room - each * length
            if rest:
                runs.setdefault(rest, []).append((first, take))
                rooms |= 1 << rest
    return placements, order, num_packs
