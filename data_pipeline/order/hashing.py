"""Order without state: splitmix64 of a counter, and permutations made from it.

No numpy random streams: their contents may change between versions, and an order must not (docs/data_order.md).
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 over a uint64 array.

    Steele, Lea, Flood: Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*parts: int | str) -> int:
    """A 64-bit key from numbers and names: the place of a stream of hashes, e.g. (seed, source, pass, "window")."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def counter_hash(key: int, counter: np.ndarray) -> np.ndarray:
    """uint64 hashes of `counter` (integers, any shape) in the stream `key`."""
    steps = counter.astype(np.uint64) + np.uint64(1)
    return splitmix64(steps * np.uint64(_GOLDEN) + np.uint64(key & _MASK))


def permutation(key: int, size: int) -> np.ndarray:
    """A permutation of range(size), int64: the argsort of its counters' hashes."""
    return np.argsort(counter_hash(key, np.arange(size, dtype=np.uint64)), kind="stable")


def grouped_permutation(key: int, groups: np.ndarray, items: np.ndarray) -> np.ndarray:
    """Indices that sort by `groups` (non-decreasing already) and shuffle within each group by the hash of `items`."""
    return np.lexsort((counter_hash(key, items), groups))
