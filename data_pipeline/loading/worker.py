"""What a loader process does: one work item, a micro-batch's documents, read, decoded, encoded and collated.

Which process does what never changes what comes out: work items carry sample numbers.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from data_pipeline.errors import DataError, LoadError
from data_pipeline.loading.collate import MicroBatch, TileStack, collate
from data_pipeline.loading.far import FarReads
from data_pipeline.loading.malloc import keep_memory
from data_pipeline.loading.tile_memory import Block, TileMemory
from data_pipeline.order.batch import Packs
from data_pipeline.parallel import end_with_parent, single_threaded
from data_pipeline.samples.schema import Encoder, SampleError, encode_as_measured
from data_pipeline.shards.reader import Conversation, IndexEntry, SourceReader, entry_label
from data_pipeline.shards.sources import BadSample

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that ask a job to stop."""
READ_AHEAD, READ_BYTES = 3, 256 * 1024
"""How many reads are made while earlier samples are decoded, and bytes of one read: it takes several small samples
together, because handing one over costs as much CPU time as reading a small sample."""
_NO_TILES = torch.empty(0, dtype=torch.uint8)


@dataclass(frozen=True)
class WorkItem:
    """One micro-batch to make."""

    step: int
    epoch: int
    documents: np.ndarray
    """int64 [D, 4]: source number, sample number, tokens and tiles of each document."""
    block: Block | None
    """Shared memory for the tiles; None where there is none."""
    ahead: np.ndarray | None = None
    """int64 [D, 2]: source and sample number of the documents that the same process will most likely need next; None
    where all sources are local."""

    @classmethod
    def of(cls, step: int, epoch: int, packs: Packs) -> WorkItem:
        """The documents of these packs."""
        documents = np.stack([packs.source, packs.index, packs.tokens, packs.tiles], axis=1)
        return cls(step, epoch, documents, None)

    def with_memory(self, memory: TileMemory | None, tile_bytes: int) -> WorkItem:
        """The same with a place for its tiles of `tile_bytes` each, where there is memory."""
        if memory is None:
            return self
        return replace(self, block=memory.allocate(int(self.documents[:, 3].sum()) * tile_bytes))


@dataclass(frozen=True)
class WorkResult:
    """A finished micro-batch, and the samples that had to be left out of it."""

    batch: MicroBatch
    bad: list[BadSample]
    num_seen: int
    block: Block | None = None
    """Where the tiles lie, in the loader process; the training process' tiles own it (`_received`)."""

    def pin_memory(self) -> WorkResult:
        return replace(self, batch=self.batch.pin_memory())

    def __reduce__(self) -> tuple[Callable[..., WorkResult], tuple[Any, ...]]:
        """Pickled without its tiles where they lie in shared memory."""
        if self.block is None:
            return WorkResult, (self.batch, self.bad, self.num_seen)
        batch, shape = replace(self.batch, tiles=_NO_TILES), tuple(self.batch.tiles.shape)
        return _received, (batch, self.bad, self.num_seen, self.block, shape)


def _received(
    batch: MicroBatch, bad: list[BadSample], num_seen: int, block: Block, shape: tuple[int, ...]
) -> WorkResult:
    return WorkResult(replace(batch, tiles=block.owning_tensor(shape)), bad, num_seen)


class MicroBatches(Dataset[WorkResult | LoadError]):
    """Work items to micro-batches.

    A LoadError is returned, and any other trouble with data or disk as one: raised in a loader process, it would come
    back wrapped in that process' traceback, and end this rank while the others wait for it.
    """

    def __init__(self, readers: list[SourceReader], encoder: Encoder, far: FarReads | None = None) -> None:
        self.readers, self.encoder, self._far = readers, encoder, far

    def __getitem__(self, item: WorkItem) -> WorkResult | LoadError:
        try:
            return self._work(item)
        except LoadError as error:
            return error
        except (DataError, OSError) as error:
            return LoadError(str(error))

    def _work(self, item: WorkItem) -> WorkResult:
        encoded, keys, sources, bad = [], [], [], []
        if self._far is not None:
            self._far.begin(item.step, item.documents, item.ahead)
        stack = TileStack(int(item.documents[:, 3].sum()), self.encoder.tile_size, item.block)
        with ThreadPoolExecutor(1, "read") as thread:
            for document, data in self._reading(item.documents, thread):
                name, entry = document.reader.name, document.entry
                try:
                    if isinstance(data, SampleError):
                        raise data
                    sample = document.reader.decode(entry, *data)
                    found = encode_as_measured(self.encoder, sample, document.tokens, document.tiles)
                    encoded.append(stack.add(found))
                    keys.append(entry_label(name, entry))
                    sources.append(document.source)
                except SampleError as error:
                    bad.append(BadSample(name, entry.shard, entry.key, str(error)))
        batch = collate(encoded, keys, step=item.step, epoch=item.epoch, sources=sources, stack=stack)
        return WorkResult(batch, bad, len(item.documents), item.block)

    def _reading(self, documents: np.ndarray, thread: ThreadPoolExecutor) -> Iterator[_Read]:
        """Every document in its turn and its bytes, while the thread reads the next ones."""
        rows = iter(documents.tolist())

        def read() -> list[_Read]:
            try:
                return self._read_some(rows)
            except Exception:
                deque(rows, maxlen=0)  # each of those behind it would wait for the store in its turn, for minutes
                raise

        ahead = deque(thread.submit(read) for _ in range(READ_AHEAD))
        while group := ahead.popleft().result():
            ahead.append(thread.submit(read))
            yield from group

    def _read_some(self, rows: Iterator[list[int]]) -> list[_Read]:
        """The next documents, of READ_BYTES together: what `decode` takes, or why one cannot be used.

        Pillow decodes without Python's lock, so what is done here costs the decoding thread nothing.
        """
        group: list[_Read] = []
        size = 0
        for source, number, tokens, tiles in rows:
            reader = self.readers[source]
            document = _Document(source, reader, reader.entry(number), tokens, tiles)
            try:
                data = reader.read(document.entry, None if self._far is None else self._far.read_range(source))
                size += sum(map(len, data.values()))
                group.append((document, (data, reader.conversation(document.entry, data))))
            except SampleError as error:
                group.append((document, error))
            if size >= READ_BYTES:
                break
        return group


@dataclass(frozen=True)
class _Document:
    """A document, and what it was measured as."""

    source: int
    reader: SourceReader
    entry: IndexEntry
    tokens: int
    tiles: int


_Read = tuple[_Document, tuple[dict[str, bytes], Conversation] | SampleError]


def prepare_process(worker: int) -> None:
    """Set up a loader process: one computing thread, freed memory kept, signals left to `_exit_when_told`."""
    single_threaded()
    keep_memory()
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = os.getppid()
    threading.Thread(target=_exit_when_told, args=(parent,), name="signals", daemon=True).start()
    end_with_parent(parent)


def _exit_when_told(parent: int) -> None:
    """Exit at a signal from the training process, and from nobody else.

    Schedulers and launchers signal every process of a job; the training process, which decides what follows, still
    needs batches for the step after which it saves. When it ends by an error, its own SIGTERM ends this one at once.
    """
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        continue
    os._exit(0)
