"""litdata: chunks fetched whole into a cache, two ahead."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import litdata
from _reading import BATCH, PREFETCH, SHARD_BYTES, collate, cut, decode, run, samples
from litdata.streaming.downloader import _OBSTORE_CLIENT_OPTIONS

SETTINGS = {"chunk_bytes": SHARD_BYTES, "max_pre_download": 2, "shuffle": True, "images": "bytes, decoded by PIL"}


def one(images: Path, key: str) -> dict[str, Any]:
    return {"image": (images / f"{key}.jpg").read_bytes(), "record": (images / f"{key}.json").read_bytes()}


def write(images: Path, folder: Path) -> None:
    keys = [key for key, *_ in samples(images)]
    litdata.optimize(
        fn=partial(one, images), inputs=keys, output_dir=str(folder), chunk_bytes=SHARD_BYTES, num_workers=1
    )


def tile(sample: dict[str, Any]) -> tuple[Any, Any]:
    return json.loads(sample["record"]), cut(decode(sample["image"]))


def build(place: str, cache: Path) -> Any:
    remote: dict[str, Any] = {}
    if place.startswith("s3://"):
        keys = {"aws_access_key_id": "AWS_ACCESS_KEY_ID", "aws_secret_access_key": "AWS_SECRET_ACCESS_KEY"}
        _OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # no option of litdata's; the store on loopback speaks plain HTTP
        options = {"endpoint_url": "AWS_ENDPOINT_URL", **keys}
        remote = {
            "cache_dir": str(cache),
            "storage_options": {name: os.environ[key] for name, key in options.items()},
        }
    dataset = litdata.StreamingDataset(place, shuffle=True, transform=tile, max_pre_download=2, **remote)
    return litdata.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=1, prefetch_factor=PREFETCH, collate_fn=collate
    )


if __name__ == "__main__":
    run(write, build, ["litdata"], SETTINGS)
