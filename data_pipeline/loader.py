"""From the plan to tensors: worker processes read, decode, encode and collate; the plan itself runs in the training
process.

Which worker does what never changes what comes out: work items carry sample numbers, and results come back in order.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_pipeline.batch import GlobalBatch, accumulation_steps
from data_pipeline.collate import MicroBatch, collate
from data_pipeline.decode import SourceReader, entry_label
from data_pipeline.errors import DataError
from data_pipeline.ledger import Ledger
from data_pipeline.parallel import single_threaded
from data_pipeline.plan import Plan, Position
from data_pipeline.schema import Encoded, Encoder, Sample, SampleError
from data_pipeline.sources import BadSample, Source

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""What asks a job to stop."""


@dataclass(frozen=True)
class WorkItem:
    """One micro-batch to make: its documents as (source number, sample number, tokens, tiles), int64 [D, 4]."""

    step: int
    epoch: int
    documents: np.ndarray


@dataclass(frozen=True)
class WorkResult:
    """A finished micro-batch and the samples that had to be left out of it."""

    batch: MicroBatch
    bad: list[BadSample]
    num_seen: int

    def pin_memory(self) -> WorkResult:
        return replace(self, batch=self.batch.pin_memory())


class MicroBatches(Dataset[WorkResult]):
    """Work items to micro-batches: what a loader process runs."""

    def __init__(self, readers: list[SourceReader], encoder: Encoder) -> None:
        self.readers, self.encoder = readers, encoder

    def __getitem__(self, item: WorkItem) -> WorkResult:
        encoded, keys, bad = [], [], []
        for source, number, tokens, tiles in item.documents.tolist():
            reader = self.readers[source]
            entry = reader.entry(number)
            try:
                encoded.append(_encode(self.encoder, reader.sample(entry), tokens, tiles))
                keys.append(entry_label(reader.name, entry))
            except SampleError as error:
                bad.append(BadSample(reader.name, entry.shard, entry.key, str(error)))
        return WorkResult(collate(encoded, keys, step=item.step, epoch=item.epoch), bad, len(item.documents))


def _encode(encoder: Encoder, sample: Sample, tokens: int, tiles: int) -> Encoded:
    encoded = encoder.encode(sample)
    found = (len(encoded.input_ids), len(encoded.labels), len(encoded.tiles))
    if found != (tokens, tokens, tiles):
        raise SampleError(
            f"encoded to {found[0]} tokens, {found[1]} labels and {found[2]} tiles, "
            f"but measured as {tokens} tokens and {tiles} tiles"
        )
    return encoded


class _WorkItems(Sampler[WorkItem]):
    """One rank's work items from a position to the end of the plan."""

    def __init__(self, plan: Plan, start: Position, rank: int, world_size: int, micro_batch_packs: int) -> None:
        self.plan, self.start = plan, start
        self.rank, self.world_size, self.micro_batch_packs = rank, world_size, micro_batch_packs

    def __iter__(self) -> Iterator[WorkItem]:
        for batch in self.plan.batches(self.start):
            yield from work_items(batch, self.rank, self.world_size, self.micro_batch_packs)


def work_items(batch: GlobalBatch, rank: int, world_size: int, micro_batch_packs: int) -> list[WorkItem]:
    """A rank's micro-batches of a global batch."""
    items = []
    for packs in batch.micro_batches(world_size, micro_batch_packs)[:, rank]:
        mine = batch.packs.take(packs)
        items.append(
            WorkItem(batch.step, batch.epoch, np.stack([mine.source, mine.index, mine.tokens, mine.tiles], axis=1))
        )
    return items


class Loader:
    """Iterates over optimizer steps: a list with this rank's micro-batches of each, one per accumulation step.

    `wait_seconds` adds up the time that `next` took: what the training process waited for data.
    """

    def __init__(
        self,
        items: _WorkItems,
        accumulation: int,
        loader: DataLoader[WorkResult],
        num_steps: int,
        ledger: Ledger | None,
    ) -> None:
        self.accumulation, self.ledger, self.wait_seconds = accumulation, ledger, 0.0
        self._items, self._loader, self._num_steps = items, loader, num_steps

    def __len__(self) -> int:
        """Steps from the start position to the end of the plan."""
        return self._num_steps

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        """Raises DataError when a worker process dies, or when too many samples are bad."""
        began = time.perf_counter()
        results = iter(self._loader)
        try:
            step: list[MicroBatch] = []
            for result in results:
                if self.ledger is not None:
                    self.ledger.record(result.num_seen, result.bad)
                step.append(result.batch)
                if len(step) == self.accumulation:
                    self.wait_seconds += time.perf_counter() - began
                    yield step
                    step, began = [], time.perf_counter()
        except RuntimeError as error:  # torch has no class of its own for it, and raises it wherever this process is
            if not str(error).startswith("DataLoader worker"):
                raise
            raise DataError(
                f"a loader process died ({error}); it was killed from outside or ran out of memory or of /dev/shm: "
                "lower data.num_workers or data.prefetch, or give the container more shared memory"
            ) from error
        finally:
            shutdown = getattr(results, "_shutdown_workers", None)
            if shutdown is not None:
                shutdown()


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
) -> Loader:
    """This rank's steps of a plan over measured sources (`sources.open_source`), from `start_step` on.

    Args:
        micro_batch_packs: packs per rank and micro-batch; global_batch_packs must be a multiple of it times world_size.
        num_workers: loader processes; 0 works in the calling process. The batches are the same for any number.
        prefetch: micro-batches that each process keeps ready.
        ledger: where bad samples go; without one they are only left out.

    Raises:
        DataError: batch sizes that do not divide, or a position of another plan.
    """
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of world size {world_size}")
    accumulation = accumulation_steps(plan.global_batch_packs, world_size, micro_batch_packs)
    start = start_step if isinstance(start_step, Position) else plan.position(start_step)
    plan.check(start)
    items = _WorkItems(plan, start, rank, world_size, micro_batch_packs)
    parallel: dict[str, Any] = {}
    if num_workers > 0:
        parallel = {"prefetch_factor": prefetch, "worker_init_fn": _prepare_worker}
    dataset = MicroBatches(_readers(plan.sources), encoder)
    loader = DataLoader(
        dataset, batch_size=None, sampler=items, num_workers=num_workers, pin_memory=pin_memory, **parallel
    )
    return Loader(items, accumulation, loader, plan.num_steps - start.step, ledger)


def _readers(sources: Mapping[str, Any]) -> list[SourceReader]:
    for name, source in sources.items():
        if not isinstance(source, Source):
            raise DataError(f"source {name!r} can only be planned, not read: open it with open_source")
    return [source.reader for source in sources.values()]


def _prepare_worker(worker: int) -> None:
    """One thread for the work; signals wait for `_obey_only`."""
    single_threaded()
    torch.set_num_threads(1)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_obey_only, args=(os.getppid(),), name="signals", daemon=True).start()


def _obey_only(parent: int) -> None:
    """End at a signal of the training process, and at nobody else's.

    Schedulers and launchers signal every process of a job; the training process, which decides what follows, still
    needs batches for the step after which it saves. When it ends by an error, its own SIGTERM ends this one at once.
    """
    while signal.sigwaitinfo(SIGNALS).si_pid != parent:
        continue
    os._exit(0)
