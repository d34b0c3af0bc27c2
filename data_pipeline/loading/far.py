"""What a loader process reads from object stores: the samples of its work item, and those of its next items ahead.

By ranges, in the order of the plan, or from whole shards on the node's disk (whole.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.loading.whole import WholeShards
from data_pipeline.shards.reader import ReadRange, SourceReader
from data_pipeline.stores.fetch_ahead import FetchAhead, Range, node_processes, reads_in_flight
from data_pipeline.stores.object_storage import ObjectStorage

MOST_PLACES = 4096
"""Places of documents that a process remembers."""


def is_far(reader: SourceReader) -> bool:
    """Whether a source lies in an object store."""
    return isinstance(reader.storage, ObjectStorage)


class FarReads:
    """The reads of one process, made in the order of its work items. Made before a fork, used after it.

    Args:
        workers: loader processes of this rank.
        whole: the sources that are read from whole shards.
    """

    def __init__(self, readers: Sequence[SourceReader], workers: int, whole: WholeShards | None = None) -> None:
        self.readers, self.workers, self.whole = readers, workers, whole
        far = (number for number, reader in enumerate(readers) if is_far(reader))
        self._by_ranges = any(whole is None or number not in whole for number in far)
        self._range = lru_cache(MOST_PLACES)(self._find)  # a document is named by several work items before its own
        self._fetch: FetchAhead | None = None
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, step: int, documents: np.ndarray, ahead: np.ndarray | None) -> None:
        """Start a work item: read its documents int64 [D, …] (source, sample, …), and then those of `ahead`."""
        if self.whole:
            near = documents[:, :2]
            self.whole.begin(step, near if ahead is None else np.concatenate([near, ahead]))
        if self._fetch is None or self._thread is None:
            self._fetch = FetchAhead(reads_in_flight(node_processes(self.workers)))
            self._thread = ThreadPoolExecutor(1, "ahead")
        if not self._by_ranges:  # a shard that has no room is read without forecast
            return
        now = list(self._ranges(documents))
        generation = self._fetch.expect(now)
        if ahead is not None:
            self._thread.submit(self._foresee, generation, now, ahead)

    def read_range(self, source: int) -> ReadRange | None:
        """How a source's shards are read; None for one that is not far away."""
        storage = self.readers[source].storage
        if not isinstance(storage, ObjectStorage):
            return None
        if self.whole is not None and source in self.whole:
            return partial(self._take_whole, self.whole, source, storage)
        return partial(self._take, storage)

    def _take(self, storage: ObjectStorage, name: str, offset: int, size: int) -> memoryview:
        assert self._fetch is not None
        return self._fetch.take(Range(storage, name, offset, offset + size))

    def _take_whole(
        self, whole: WholeShards, source: int, storage: ObjectStorage, name: str, offset: int, size: int
    ) -> bytes | memoryview:
        data = whole.read_range(source, name, offset, size)
        return self._take(storage, name, offset, size) if data is None else data

    def _foresee(self, generation: int, now: list[Range], ahead: np.ndarray) -> None:
        """Announce these reads; runs in a thread of its own, since indexes of coming shards may have to be fetched."""
        assert self._fetch is not None
        try:
            self._fetch.foresee(generation, now, list(self._ranges(ahead)))
        except DataError:
            return  # whoever needs the sample says so

    def _ranges(self, documents: np.ndarray) -> Iterable[Range]:
        for source, number in documents[:, :2].tolist():
            if found := self._range(source, number):
                yield found

    def _find(self, source: int, number: int) -> Range | None:
        reader = self.readers[source]
        if not isinstance(reader.storage, ObjectStorage) or (self.whole and source in self.whole):
            return None
        entry = reader.entry(number)
        span = reader.span(entry)
        return None if span is None else Range(reader.storage, entry.shard, *span)
