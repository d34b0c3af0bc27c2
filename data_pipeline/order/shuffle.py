"""The order of one source: an endless stream of passes, each a permutation of its usable samples. Pure, random access.

Shards are permuted, runs of `window_shards` of them form windows, and samples are permuted inside a window, so that
reading touches few shards at a time (docs/data_order.md).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np

from data_pipeline.order.hashing import grouped_permutation, hash_key, permutation
from data_pipeline.order.settings import PlanSettings

_CHUNK = 1 << 20


class PlanSource(Protocol):
    """What the plan knows of a source."""

    @property
    def fingerprint(self) -> str:
        """Changes with the content and the sample lengths: another one is another order."""
        ...

    @property
    def measures(self) -> np.ndarray:
        """uint32 [N, 2]: tokens and tiles of each sample; (0, 0) cannot be used, (0, 1) is not selected."""
        ...

    @property
    def shard_starts(self) -> np.ndarray:
        """int64 [shards + 1]: number of the first sample of each shard, and N."""
        ...


class SourceOrder:
    """Maps positions in a source's endless stream (draws) to sample numbers."""

    def __init__(self, name: str, source: PlanSource, settings: PlanSettings) -> None:
        self.name, self.settings = name, settings
        self.measures, self.starts = source.measures, np.asarray(source.shard_starts, dtype=np.int64)
        self.num_unmeasured = self.num_unselected = self.num_too_long = 0
        self.usable = self._count_usable()  # int64 [shards]
        self.num_usable = int(self.usable.sum())
        self._pass = lru_cache(maxsize=2)(self._layout)

    def ids(self, start: int, stop: int) -> np.ndarray:
        """int64 sample numbers of draws [start, stop)."""
        parts = []
        while start < stop:
            number, begin = divmod(start, self.num_usable)
            end = min(begin + stop - start, self.num_usable)
            parts.append(self._within(number, begin, end))
            start += end - begin
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def _within(self, number: int, begin: int, end: int) -> np.ndarray:
        shards, starts = self._pass(number)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        last = int(np.searchsorted(starts, end, side="left"))
        chosen = shards[first * self.settings.window_shards : last * self.settings.window_shards]
        sizes = self.starts[chosen + 1] - self.starts[chosen]
        offsets = np.cumsum(sizes) - sizes
        ids = np.repeat(self.starts[chosen] - offsets, sizes) + np.arange(int(sizes.sum()))
        windows = np.repeat(np.arange(len(chosen)) // self.settings.window_shards, sizes)
        usable = self._usable(self.measures[ids, 0])
        ids, windows = ids[usable], windows[usable]
        mixed = ids[grouped_permutation(hash_key(self.settings.seed, "samples", self.name, number), windows, ids)]
        return mixed[begin - starts[first] : end - starts[first]]

    def _layout(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A pass's shards in order, and the draw (in the pass) at which each window of them starts."""
        shards = permutation(hash_key(self.settings.seed, "shards", self.name, number), len(self.usable))
        counts = np.add.reduceat(self.usable[shards], np.arange(0, len(shards), self.settings.window_shards))
        return shards, np.concatenate([[0], np.cumsum(counts)])

    def _usable(self, tokens: np.ndarray) -> np.ndarray:
        return (tokens > 0) & (tokens <= self.settings.sequence_length)

    def _count_usable(self) -> np.ndarray:
        before = np.zeros(len(self.starts), dtype=np.int64)  # usable samples before each shard
        total = 0
        for begin in range(0, int(self.starts[-1]), _CHUNK):
            tokens, tiles = np.asarray(self.measures[begin : begin + _CHUNK]).T
            self.num_unmeasured += int(np.count_nonzero((tokens == 0) & (tiles == 0)))
            self.num_unselected += int(np.count_nonzero((tokens == 0) & (tiles != 0)))
            self.num_too_long += int(np.count_nonzero(tokens > self.settings.sequence_length))
            running = np.concatenate([[0], np.cumsum(self._usable(tokens), dtype=np.int64)])
            end = begin + len(tokens)
            low = int(np.searchsorted(self.starts, begin))
            high = len(self.starts) if end == self.starts[-1] else int(np.searchsorted(self.starts, end))
            before[low:high] = total + running[self.starts[low:high] - begin]
            total += int(running[-1])
        return np.diff(before)
