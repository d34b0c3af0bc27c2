"""Packs that are read once and kept in memory, for those who compute with the same ones again and again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from data_pipeline.loading.collate import MicroBatch
from data_pipeline.loading.far import FarReads, is_far
from data_pipeline.loading.ledger import Ledger
from data_pipeline.loading.loader import Loader, open_loader, open_readers
from data_pipeline.loading.tile_memory import TileMemory
from data_pipeline.loading.worker import MicroBatches, WorkItem
from data_pipeline.order.batch import Packs
from data_pipeline.samples.schema import Encoder

PREFETCH = 2
"""Packs that each loader process keeps ready."""


def load_packs(
    packs: Packs,
    numbers: np.ndarray,
    sources: Mapping[str, Any],
    encoder: Encoder,
    *,
    num_workers: int = 0,
    ledger: Ledger | None = None,
) -> list[MicroBatch]:
    """The packs of these numbers, one per micro-batch; numbers from len(packs) on are micro-batches without documents.

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
    loader = open_loader(dataset, items, num_workers, PREFETCH, generator=torch.Generator())
    return [copy.deepcopy(batch) for [batch] in Loader(loader, 1, len(numbers), ledger)]
