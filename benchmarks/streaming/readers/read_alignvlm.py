"""This project's loader, by the same rules: the samples' bytes are checked and packed besides."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _reading import PREFETCH, SHARD_BYTES, run, samples

sys.path.insert(1, str(Path(__file__).resolve().parents[3]))
sys.path.insert(2, str(Path(__file__).resolve().parents[2]))

from loader import PageEncoder

from data_pipeline.loading.loader import build_loader
from data_pipeline.order.plan import Plan
from data_pipeline.order.settings import PlanSettings
from data_pipeline.shards.sources import measure_source, open_source
from data_pipeline.shards.writer import write_shards

SETTINGS = {"read": "ranges", "shard_bytes": SHARD_BYTES, "sequence_length": 8192, "batch": "one pack"}


def write(images: Path, folder: Path) -> None:
    records = ({"key": key, "messages": json.loads(record), "images": [jpeg]} for key, jpeg, record in samples(images))
    write_shards(records, folder, shard_bytes=SHARD_BYTES, num_processes=1)
    measure_source(folder, PageEncoder(), num_processes=1)


class Tiles:
    """Micro-batches as (tiles,)."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[tuple[torch.Tensor]]:
        return ((batch.tiles,) for step in self.loader for batch in step)


def build(place: str, cache: Path) -> Any:
    os.environ["ALIGNVLM_CACHE"] = str(cache)
    encoder = PageEncoder()
    source = open_source("pages", place, encoder)
    plan = Plan({"pages": source}, {"pages": 1}, PlanSettings(sequence_length=8192, global_batch_packs=1))
    return Tiles(build_loader(plan, encoder, num_workers=1, prefetch=PREFETCH, reads={"pages": "ranges"}))


if __name__ == "__main__":
    run(write, build, ["obstore"], SETTINGS)
