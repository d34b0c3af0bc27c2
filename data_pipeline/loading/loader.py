"""From the plan to tensors: loader processes make the micro-batches of a plan, and they come back in its order."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from data_pipeline.errors import DataError, LoadError
from data_pipeline.loading.collate import MicroBatch
from data_pipeline.loading.far import FarReads, is_far
from data_pipeline.loading.ledger import Ledger
from data_pipeline.loading.read_mode import Read, cache_limit, choose
from data_pipeline.loading.tile_memory import TileMemory
from data_pipeline.loading.whole import WholeShards
from data_pipeline.loading.worker import MicroBatches, WorkItem, WorkResult, prepare_process
from data_pipeline.order.batch import Packs, accumulation_steps
from data_pipeline.order.plan import Plan, Position
from data_pipeline.samples.schema import Encoder
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sources import Source
from data_pipeline.stores.fetch_ahead import num_nodes

ITEMS_AHEAD, DOCUMENTS_AHEAD = 16, 192
"""Work items of the same process, and documents of them at most, that an item names for reading ahead."""
KEPT_PREFETCH = 2
"""Packs that each loader process keeps ready where they are read once."""


class _WorkItems(Sampler[WorkItem]):
    """One rank's work items from a position to the end of the plan."""

    def __init__(
        self,
        plan: Plan,
        start: Position,
        ranks: tuple[int, int],
        micro_batch_packs: int,
        memory: TileMemory | None,
        tile_bytes: int,
        stride: int,
    ) -> None:
        self.plan, self.start, self.micro_batch_packs = plan, start, micro_batch_packs
        self.rank, self.world_size = ranks
        self.memory, self.tile_bytes, self.stride = memory, tile_bytes, stride

    def __iter__(self) -> Iterator[WorkItem]:
        """Processes get items in turn: where samples lie far away, an item names those of its process' next items."""
        if not self.stride:
            yield from map(self._with_memory, self._items())
            return
        coming: deque[WorkItem] = deque()
        items = self._items()
        while True:
            coming += islice(items, self.stride * ITEMS_AHEAD + 1 - len(coming))
            if not coming:
                return
            item = coming.popleft()
            following = [each.documents[:, :2] for each in list(coming)[self.stride - 1 :: self.stride]]
            ahead = np.concatenate([item.documents[:0, :2], *following])[:DOCUMENTS_AHEAD]
            yield self._with_memory(replace(item, ahead=ahead))

    def _with_memory(self, item: WorkItem) -> WorkItem:
        return item.with_memory(self.memory, self.tile_bytes)

    def _items(self) -> Iterator[WorkItem]:
        for batch in self.plan.batches(self.start):
            for packs in batch.micro_batches(self.world_size, self.micro_batch_packs)[:, self.rank]:
                yield WorkItem.of(batch.step, batch.epoch, batch.packs.take(packs))


class Loader:
    """Iterates over optimizer steps: a list with this rank's micro-batches of each, one per accumulation step.

    `wait_seconds` adds up the time that `next` took: what the training process waited for data.
    """

    def __init__(
        self,
        loader: DataLoader[WorkResult | LoadError],
        accumulation: int,
        num_steps: int,
        ledger: Ledger | None,
        whole: WholeShards | None = None,
    ) -> None:
        self.accumulation, self.ledger, self.wait_seconds = accumulation, ledger, 0.0
        self._loader, self._num_steps, self._whole = loader, num_steps, whole
        self._results: Iterator[WorkResult | LoadError] | None = None

    def start(self) -> Loader:
        """Start the loader processes now; iterating does it otherwise.

        They are forked, since they share memory for the tiles: call this before the process starts threads that may
        hold a lock at that moment.
        """
        if self._results is None:
            self._results = iter(self._loader)
        return self

    def __len__(self) -> int:
        """Steps from the start position to the end of the plan."""
        return self._num_steps

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Raises LoadError when shards cannot be read, a loader process dies, or too many samples are bad."""
        began = time.perf_counter()
        results = iter(self._loader) if self._results is None else self._results
        self._results = None
        try:
            try:
                step: list[MicroBatch] = []
                for result in results:
                    if isinstance(result, LoadError):
                        raise result
                    if self.ledger is not None:
                        self.ledger.record(result.num_seen, result.bad)
                    step.append(result.batch)
                    if len(step) == self.accumulation:
                        if self._whole:  # whoever asks for this step has ended the one before, and so have all ranks
                            self._whole.passed(max(result.batch.step - 1, 0))
                        self.wait_seconds += time.perf_counter() - began
                        yield step
                        step, began = [], time.perf_counter()
            finally:
                shutdown = getattr(results, "_shutdown_workers", None)
                if shutdown is not None:
                    shutdown()
        except RuntimeError as error:  # torch has no class of its own for it, and raises it wherever this process is
            if not str(error).startswith("DataLoader worker"):
                raise
            raise LoadError(
                f"a loader process died ({error}); it was killed from outside or ran out of memory or of /dev/shm: "
                "lower data.num_workers or data.prefetch, or give the container more shared memory"
            ) from error


def build_loader(
    plan: Plan,
    encoder: Encoder,
    *,
    rank: int = 0,
    world_size: int = 1,
    micro_batch_packs: int = 1,
    start_step: int | Position = 0,
    num_workers: int = 1,
    prefetch: int = 4,
    ledger: Ledger | None = None,
    pin_memory: bool = False,
    reads: Mapping[str, Read] | None = None,
    cache_bytes: int | None = None,
) -> Loader:
    """This rank's steps of a plan over measured sources (`sources.open_source`), from `start_step` on.

    Args:
        micro_batch_packs: packs per rank and micro-batch; global_batch_packs must be a multiple of it times world_size.
        num_workers: loader processes; 0 works in the calling process. The batches are the same for any number.
        prefetch: micro-batches that each process keeps ready.
        ledger: where bad samples go; without one they are only left out.
        reads: how sources in object stores are read (read_mode.py); `auto` for those that are not named.
        cache_bytes: of whole shards on this node's disk; None: three quarters of what is free, at most 200 GB.

    Raises:
        DataError: batch sizes that do not divide, or a position of another plan.
    """
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size} ranks: must be from 0 to {world_size - 1}")
    accumulation = accumulation_steps(plan.settings.global_batch_packs, world_size, micro_batch_packs)
    start = start_step if isinstance(start_step, Position) else plan.position(start_step)
    plan.check(start)
    memory = TileMemory() if num_workers else None
    readers = open_readers(plan.sources)
    far = None
    if any(map(is_far, readers)):
        choices = choose(plan, reads or {}, num_nodes(world_size), cache_bytes)
        chosen = [name for name, choice in choices.items() if choice.mode == "shards"]
        whole = WholeShards(plan, chosen, cache_limit(cache_bytes) if chosen else 0)
        far = FarReads(readers, num_workers, whole)
    stride = max(num_workers, 1) if far else 0
    items = _WorkItems(plan, start, (rank, world_size), micro_batch_packs, memory, 3 * encoder.tile_size**2, stride)
    loader = open_loader(MicroBatches(readers, encoder, far), items, num_workers, prefetch, pin_memory)
    return Loader(loader, accumulation, plan.num_steps - start.step, ledger, far.whole if far else None)


def load_packs(
    packs: Packs,
    numbers: np.ndarray,
    sources: Mapping[str, Any],
    encoder: Encoder,
    *,
    num_workers: int = 0,
    ledger: Ledger | None = None,
) -> list[MicroBatch]:
    """Packs to be kept in memory, one per micro-batch; numbers from len(packs) on give micro-batches without documents.

    Random numbers of the caller's process are left alone, and nothing of the loader processes stays: the tensors are
    this process's own.

    Args:
        numbers: int64 [n].
        sources: name -> what `sources.open_source` returns, numbered in this order by `packs.source`.

    Raises:
        LoadError: shards cannot be read, a loader process dies, or too many samples are bad.
    """
    readers = open_readers(sources)
    memory = TileMemory() if num_workers else None
    items = (
        WorkItem.of(0, 0, packs.take(np.asarray([number]))).with_memory(memory, 3 * encoder.tile_size**2)
        for number in numbers.tolist()
    )
    far = FarReads(readers, num_workers) if any(map(is_far, readers)) else None
    dataset = MicroBatches(readers, encoder, far)
    loader = open_loader(dataset, items, num_workers, KEPT_PREFETCH, generator=torch.Generator())
    return [copy.deepcopy(batch) for [batch] in Loader(loader, 1, len(numbers), ledger)]


def open_loader(
    dataset: MicroBatches,
    items: Iterable[WorkItem],
    num_workers: int,
    prefetch: int,
    pin_memory: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader[WorkResult | LoadError]:
    """The results of work items, in order, by `num_workers` processes; 0: by this one.

    Starting it draws a number from `generator`, without one from the random numbers of this process.
    """
    processes: dict[str, Any] = {}
    if num_workers > 0:
        processes = {
            "prefetch_factor": prefetch,
            "worker_init_fn": prepare_process,
            "multiprocessing_context": "fork",  # they share the memory, and their parent is this process
        }
    return DataLoader(
        dataset, batch_size=None, sampler=items, num_workers=num_workers, pin_memory=pin_memory, generator=generator,
        **processes,
    )  # fmt: skip


def open_readers(sources: Mapping[str, Any]) -> list[SourceReader]:
    """The readers of measured sources, in order. Raises DataError for one that can only be planned."""
    for name, source in sources.items():
        if not isinstance(source, Source):
            raise DataError(f"source {name!r} can only be planned, not read: open it with open_source")
    return [source.reader for source in sources.values()]
