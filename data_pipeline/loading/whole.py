"""Whole shards on the node's disk: fetched two windows ahead of the plan, deleted when the plan has passed them.

Each loader process looks for shards that nobody has and fetches some at a time, those first that its next work items
name. A sample whose shard is still missing waits for it; one that has no room on the disk is read by ranges.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError, LoadError
from data_pipeline.order.plan import Plan
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sources import Source
from data_pipeline.shards.storage import LocalStorage
from data_pipeline.stores.object_storage import ObjectStorage
from data_pipeline.stores.requests import DOWNLOAD_PARTS, num_parts
from data_pipeline.stores.shard_cache import Fetched, ShardCache

WINDOWS_AHEAD = 2
"""Pack windows behind the present one whose shards are fetched."""
CONNECTIONS = 16
"""A loader process begins with another whole shard while fewer requests are on their way, one for each part: one by
one, shards would mostly wait for a store 120 ms away, and with few parts for its connections of 60 MB/s."""
Shard = tuple[int, str]
"""Number of a source in the plan, and the name of a shard in it."""


class WholeShards:
    """The sources of a plan that are read from whole shards. Made before a fork, used after it, and by the parent.

    Args:
        names: these sources.
        limit: bytes of whole shards on this node.
    """

    def __init__(self, plan: Plan, names: Collection[str], limit: int) -> None:
        self.plan = plan
        self.readers: dict[int, SourceReader] = {}
        self.caches: dict[int, ShardCache] = {}
        for number, name in enumerate(plan.names):
            source = plan.sources[name]
            if name in names and isinstance(source, Source) and isinstance(source.reader.storage, ObjectStorage):
                self.readers[number] = source.reader
                self.caches[number] = ShardCache(source.reader.storage, source.reader.fingerprint, limit)
        self._files: dict[int, LocalStorage] = {}
        self._here: set[Shard] = set()
        self._window: tuple[int, int] | None = None
        self._passed: tuple[int, int] | None = None
        self._held: frozenset[Path] = frozenset()
        self._all_fit = sum(sum(reader.manifest.shards.sizes) for reader in self.readers.values()) <= limit
        self._wanted: frozenset[Path] = frozenset()
        self._kept: frozenset[Path] = frozenset()  # with those of the window before, where other ranks may be
        self._queue: deque[Shard] = deque()
        self._lock = threading.Lock()
        self._fetching = self._connections = 0  # shards that are on their way, and requests for their parts

    def __len__(self) -> int:
        return len(self.readers)

    def __contains__(self, source: object) -> bool:
        return source in self.readers

    def begin(self, step: int, documents: np.ndarray) -> None:
        """Fetch ahead for a work item of this step; `documents` int64 [D, …] (source, sample, …) come first."""
        first = self._shards_of(documents)
        with self._lock:
            coming = list(self._queue)
            if self._move_to(step):
                coming += self._shards_from(self._window_of(step))
            self._queue = deque(shard for shard in dict.fromkeys([*first, *coming]) if shard not in self._here)
            self._start()

    def read_range(self, source: int, name: str, offset: int, size: int) -> bytes | None:
        """Bytes of a shard; waits until it is on the disk. None where there is no room for it.

        Raises LoadError when it cannot be read.
        """
        storage = self._files.setdefault(source, LocalStorage(str(self.caches[source].folder)))
        shard = source, name
        for is_last in (False, True):
            if shard not in self._here and self._fetch(shard, wait=True) is not Fetched.HERE:
                return None
            try:
                return storage.read_range(name, offset, size)
            except LoadError:
                self._here.discard(shard)  # it was deleted by a job that needed the room
                if is_last:
                    raise
        return None

    def passed(self, step: int) -> None:
        """Delete what only windows before a step wanted; for the training process, when all ranks have ended the step.

        What lies there besides stays: loader processes may be further ahead than this process knows.
        """
        window = self._window_of(step)
        if self._all_fit or window == self._passed:  # what fits is found by a further epoch
            return
        wanted = self._paths(window)
        for path in self._held - wanted:
            with suppress(OSError):  # it is deleted when its room is needed
                path.unlink()
        self._passed, self._held = window, wanted

    def _window_of(self, step: int) -> tuple[int, int]:
        position = self.plan.position(step)
        return position.epoch, position.window

    def _paths(self, window: tuple[int, int]) -> frozenset[Path]:
        """Files of the shards that a window and those behind it want."""
        return frozenset(self.caches[source].path(name) for source, name in self._shards_from(window))

    def _move_to(self, step: int) -> bool:
        """Note what is wanted from this step on. False when it is known."""
        window = self._window_of(step)
        if window == self._window:
            return False
        wanted = self._paths(window)
        self._window, self._wanted, self._kept = window, wanted, wanted | self._wanted
        for storage in self._files.values():
            storage.close()  # deleted files take up the disk while they are open
        self._here.clear()
        return True

    def _shards_from(self, window: tuple[int, int]) -> Iterator[Shard]:
        for each in self.plan.windows_from(*window, WINDOWS_AHEAD + 1):
            for name, shards in self.plan.window_shards(*each).items():
                number = self.plan.names.index(name)
                if number in self.readers:
                    infos = self.readers[number].manifest.shards
                    yield from ((number, infos[shard].name) for shard in shards.tolist())

    def _shards_of(self, documents: np.ndarray) -> list[Shard]:
        """Shards of these documents, in the order of the first of each."""
        found: list[Shard] = []
        for number, reader in self.readers.items():
            samples = documents[documents[:, 0] == number, 1]
            shards = np.searchsorted(reader.shard_starts, samples, side="right") - 1
            different, places = np.unique(shards, return_index=True)
            found += ((number, reader.manifest.shards.names[shard]) for shard in different[np.argsort(places)].tolist())
        return found

    def _start(self) -> None:
        """Fetch what comes next, while there may be more requests: a large shard has several, a small one has one.

        With the lock, which is not held while they come.
        """
        while self._queue and self._connections < CONNECTIONS:
            shard = self._queue.popleft()
            size = self.caches[shard[0]].storage.pinned_size(shard[1])
            parts = min(num_parts(size), DOWNLOAD_PARTS)
            self._fetching, self._connections = self._fetching + 1, self._connections + parts
            threading.Thread(target=self._fetch_ahead, args=(shard, parts), name="whole-shards", daemon=True).start()

    def _fetch_ahead(self, shard: Shard, parts: int) -> None:
        """Fetch one shard, in a thread of its own."""
        fetched = None
        with suppress(DataError, OSError):  # whoever needs a sample of it says so
            fetched = self._fetch(shard, wait=False)
        with self._lock:
            self._fetching, self._connections = self._fetching - 1, self._connections - parts
            if fetched is Fetched.NO_ROOM:
                self._queue.clear()
            self._start()

    def _fetch(self, shard: Shard, wait: bool) -> Fetched:
        source, name = shard
        fetched = self.caches[source].fetch(name, self._kept.__contains__, wait)
        if fetched is Fetched.HERE:
            self._here.add(shard)
        return fetched
