"""MosaicML streaming: shards fetched whole into a cache, as many as hold the next samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from _reading import BATCH, PREFETCH, SHARD_BYTES, collate, cut, decode, run, samples
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader

SETTINGS = {"size_limit": SHARD_BYTES, "predownload": 8 * BATCH, "shuffle": True, "images": "bytes, decoded by PIL"}


def write(images: Path, folder: Path) -> None:
    columns = {"image": "bytes", "record": "bytes"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES, exist_ok=True) as writer:
        for _, jpeg, record in samples(images):
            writer.write({"image": jpeg, "record": record})


class Tiles(StreamingDataset):
    """Samples as (conversation, tile)."""

    def __getitem__(self, at: Any) -> Any:
        sample = super().__getitem__(at)
        return json.loads(sample["record"]), cut(decode(sample["image"]))


def build(place: str, cache: Path) -> Any:
    where = {"remote": place, "local": str(cache)} if place.startswith("s3://") else {"local": place}
    dataset = Tiles(**where, shuffle=True, batch_size=BATCH, predownload=8 * BATCH)
    return DataLoader(dataset, batch_size=BATCH, num_workers=1, prefetch_factor=PREFETCH, collate_fn=collate)


if __name__ == "__main__":
    run(write, build, ["mosaicml-streaming"], SETTINGS)
