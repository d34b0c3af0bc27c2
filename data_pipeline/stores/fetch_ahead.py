"""Reads that are on their way before they are needed: as many at a time as hide the distance to a store.

A loader process says which samples it needs next, in order (`expect`), and takes them in that order (`take`). Ranges of
one shard that are neighbours are one request. What is wanted no longer is dropped; what was not foreseen is read at
once: a wrong forecast costs a read, never a result.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from data_pipeline.stores.helper import submit
from data_pipeline.stores.object_storage import ObjectStorage

NODE_READS, LEAST_READS, MOST_READS = 256, 8, 96
"""Reads in flight of all loader processes of a node together, and the fewest and most of each process. With 32 at a
time a store that is 120 ms away gives 270 samples a second, fewer than a process decodes of small images."""
AHEAD_BYTES = 16 * 1024**2
"""Bytes that one process reads ahead; they take up to three times as much memory (benchmarks/streaming/scale.py)."""
REQUEST_BYTES = 64 * 1024
"""What a request costs, in bytes: about what one connection moves in a millisecond."""
GAP_BYTES, GAP_SHARE, MERGED_BYTES = 4 * 1024, 0.1, 1024**2
"""Two ranges are read by one request when at most so many bytes, or such a share of both, lie between them. A merged
range is not longer than this, because the first sample in it has to wait for all of it."""


def reads_in_flight(processes: int) -> int:
    """How many reads each loader process keeps in flight on a node with so many of these processes."""
    return min(max(NODE_READS // max(processes, 1), LEAST_READS), MOST_READS)


def node_processes(workers: int) -> int:
    """Loader processes of this node, where each of its ranks has `workers`."""
    return max(workers, 1) * _node_ranks()


def num_nodes(ranks: int) -> int:
    """Nodes of a job of so many ranks."""
    return -(-ranks // _node_ranks())


def _node_ranks() -> int:
    """Ranks of this node, as launchers say it; DeepSpeed's has a name of its own."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


@dataclass(frozen=True)
class Range:
    """Bytes [begin, end) of an object."""

    storage: ObjectStorage
    name: str
    begin: int
    end: int

    @cached_property
    def key(self) -> tuple[str, str, int, int]:
        return self.storage.url, self.name, self.begin, self.end


@dataclass(eq=False)
class _Read:
    """One request for neighbouring ranges, in the order in which they are needed."""

    ranges: list[Range]
    begin: int
    end: int
    future: Future[Any] | None = None
    left: set[tuple[str, str, int, int]] = field(default_factory=set)
    """Keys of the ranges that were not taken or dropped yet."""


class FetchAhead:
    """The reads of one process. Any thread may call any method.

    Args:
        gap_bytes: ranges with so many bytes between them are still neighbours.
    """

    def __init__(self, in_flight: int, ahead_bytes: int = AHEAD_BYTES, gap_bytes: int = GAP_BYTES) -> None:
        self.in_flight, self.ahead_bytes, self.gap_bytes = in_flight, ahead_bytes, gap_bytes
        self.num_requests = self.num_bytes = 0
        self._known: dict[tuple[str, str, int, int], _Read] = {}
        self._taken: set[tuple[str, str, int, int]] = set()
        self._queue: list[_Read] = []
        self._flying = self._held = self._generation = 0
        self._lock = threading.RLock()

    def expect(self, ranges: Sequence[Range]) -> int:
        """What is needed now, in this order. Returns the number that `foresee` wants for what follows it."""
        with self._lock:
            self._generation += 1
            self._queue[:0] = self._new_reads(ranges)
            self._start()
            return self._generation

    def foresee(self, generation: int, now: Sequence[Range], later: Sequence[Range]) -> None:
        """What will be needed after what was expected; all else is dropped. Nothing happens when that is past."""
        with self._lock:
            if generation != self._generation:
                return
            wanted = {each.key for each in (*now, *later)} | self._taken
            dropped = [key for key in self._known if key not in wanted]
            for key in sorted(dropped, key=lambda key: self._known[key].future is not None):
                self._forget(key)  # those in the queue first: a read that is cancelled makes room for one from there
            self._queue += self._new_reads(later)
            self._start()

    def take(self, wanted: Range) -> memoryview:
        """The bytes of a range. Raises LoadError when they cannot be read."""
        with self._lock:
            read = self._known.get(wanted.key)
            if read is None:
                (read,) = self._new_reads([wanted])
            if read.future is None:
                if read in self._queue:
                    self._queue.remove(read)
                self._submit(read)
            assert read.future is not None
            future = read.future
            self._taken.add(wanted.key)
        try:
            data, info = future.result()
        finally:
            with self._lock:
                self._taken.discard(wanted.key)
                self._forget(wanted.key)
                self._start()
        wanted.storage.answered(wanted.name, info)
        return memoryview(data)[wanted.begin - read.begin : wanted.end - read.begin]

    def _new_reads(self, ranges: Iterable[Range]) -> list[_Read]:
        """Requests for the ranges that are not known, those of neighbours merged, in the order of their first range."""
        place: dict[tuple[str, str, int, int], tuple[int, Range]] = {}
        for each in ranges:
            if each.key not in self._known:
                place.setdefault(each.key, (len(place), each))
        reads: list[tuple[int, _Read]] = []
        last: _Read | None = None
        for number, each in sorted(place.values(), key=lambda pair: pair[1].key):
            if last is not None and _are_neighbours(last, each, self.gap_bytes):
                last.ranges.append(each)
                last.end = max(last.end, each.end)
                first = min(reads[-1][0], number)
                reads[-1] = (first, last)
            else:
                last = _Read([each], each.begin, each.end)
                reads.append((number, last))
        for _, read in reads:
            read.left = {each.key for each in read.ranges}
            self._known.update(dict.fromkeys(read.left, read))
        return [read for _, read in sorted(reads, key=lambda pair: pair[0])]

    def _start(self) -> None:
        """Make requests while there may be more of them, the earliest needed first."""
        while self._queue and self._flying < self.in_flight and self._held < self.ahead_bytes:
            self._submit(self._queue.pop(0))

    def _submit(self, read: _Read) -> None:
        first = read.ranges[0]
        self._flying += 1
        self._held += read.end - read.begin
        self.num_requests += 1
        self.num_bytes += read.end - read.begin
        read.future = submit(first.storage.request(first.name, read.begin, read.end, hedged=True))
        read.future.add_done_callback(self._landed)

    def _landed(self, _: Future[Any]) -> None:
        with self._lock:
            self._flying -= 1
            self._start()

    def _forget(self, key: tuple[str, str, int, int]) -> None:
        """A range that was taken, or is not wanted any more."""
        read = self._known.pop(key, None)
        if read is None:
            return
        read.left.discard(key)
        if not read.left:
            if read.future is None:
                self._queue.remove(read)
            else:
                self._held -= read.end - read.begin
                read.future.cancel()


def _are_neighbours(read: _Read, other: Range, gap_bytes: int) -> bool:
    """Whether one request for both reads little that nobody wants."""
    last = read.ranges[-1]
    if (last.storage.url, last.name) != (other.storage.url, other.name):
        return False
    gap, size = other.begin - read.end, max(other.end, read.end) - read.begin
    return gap <= max(gap_bytes, GAP_SHARE * size) and size <= MERGED_BYTES
