"""Megatron-Energon: tars with an index in SQLite, opened through multi-storage-client with its cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
import webdataset
from _reading import BATCH, PREFETCH, SHARD_BYTES, cut, run, samples
from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    ImageSample,
    SampleDecoder,
    WorkerConfig,
    basic_sample_keys,
    get_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors import BaseWebdatasetFactory

SETTINGS = {
    "shuffle_buffer_size": 100,
    "max_samples_per_sequence": 100,
    "shard_bytes": SHARD_BYTES,
    "from S3": "msc:// with MSC's cache",
}
DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
PROFILE = "store"


def write(images: Path, folder: Path) -> None:
    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, encoder=False, verbose=0) as writer:
        for key, jpeg, record in samples(images):
            writer.write({"__key__": key, "jpg": jpeg, "json": record})
    names = sorted(path.name for path in folder.glob("*.tar"))
    BaseWebdatasetFactory.prepare_dataset(
        folder, names, split_parts_ratio=[("train", 1), ("val", 0), ("test", 0)], shuffle_seed=None, workers=1
    )
    (folder / ".nv-meta" / "dataset.yaml").write_text(DATASET)


@stateless
def cook(sample: dict[str, Any]) -> ImageSample:
    return ImageSample(**basic_sample_keys(sample), image=torch.from_numpy(cut(sample["jpg"])))


class Tiles(DefaultTaskEncoder):
    """Samples as tiles, images decoded by PIL."""

    decoder = SampleDecoder(image_decode="pilrgb")
    cookers = [Cooker(cook)]  # noqa: RUF012


def configure(bucket: str, cache: Path) -> None:
    """Where multi-storage-client finds the store, and its cache, as Energon's documentation recommends it."""
    store = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"], "base_path": bucket, "region_name": "us-east-1"}
    keys = {"access_key": os.environ["AWS_ACCESS_KEY_ID"], "secret_key": os.environ["AWS_SECRET_ACCESS_KEY"]}
    profile = {
        "storage_provider": {"type": "s3", "options": store},
        "credentials_provider": {"type": "S3Credentials", "options": keys},
    }
    kept = {"size": "20G", "check_source_version": True, "cache_backend": {"cache_path": str(cache / "msc")}}
    file = cache / "msc_config.json"
    file.write_text(json.dumps({"profiles": {PROFILE: profile}, "cache": kept}))
    os.environ["MSC_CONFIG"] = str(file)


class Loader:
    """Batches as (tiles,)."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return ((batch.image,) for batch in self.loader)


def build(place: str, cache: Path) -> Any:
    if place.startswith("s3://"):
        bucket, _, folder = place.removeprefix("s3://").partition("/")
        configure(bucket, cache)
        place = f"msc://{PROFILE}/{folder}"
    dataset = get_train_dataset(
        place,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=1),
        batch_size=BATCH,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        task_encoder=Tiles(),
        repeat=False,
    )
    return Loader(get_loader(dataset, prefetch_factor=PREFETCH))


if __name__ == "__main__":
    run(write, build, ["megatron-energon", "multi-storage-client", "webdataset"], SETTINGS)
