"""webdataset: tars read in turn by one process, shuffled by a buffer; from S3 through curl."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import webdataset
from _reading import BATCH, PREFETCH, SHARD_BYTES, collate, cut, run, samples

SETTINGS = {"shardshuffle": 100, "shuffle": 1000, "shard_bytes": SHARD_BYTES, "from S3": "pipe: of curl --aws-sigv4"}
NAMES = "names.txt"
"""The list of shards, which webdataset asks its user for."""


def write(images: Path, folder: Path) -> None:
    pattern = str(folder / "%06d.tar")
    with webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, encoder=False, verbose=0) as writer:
        for key, jpeg, record in samples(images):
            writer.write({"__key__": key, "jpg": jpeg, "json": record})
    names = sorted(path.name for path in folder.glob("*.tar"))
    (folder / NAMES).write_text("\n".join(names))


def tars(place: str) -> list[str]:
    """What WebDataset opens: paths, or commands, which sign and fetch as `aws s3 cp` does with less CPU."""
    if not place.startswith("s3://"):
        return sorted(str(path) for path in Path(place).glob("*.tar"))
    parts, keys = urlsplit(place), (os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
    region = os.environ["AWS_REGION"]
    curl = f"curl -f -s --retry 5 --aws-sigv4 aws:amz:{region}:s3 --user {':'.join(keys)}"
    url = f"{os.environ['AWS_ENDPOINT_URL']}/{parts.netloc}{parts.path}"
    names = os.popen(f"{curl} {url}/{NAMES}").read().split()
    return [f"pipe:{curl} {url}/{name}" for name in names]


def tile(sample: dict[str, Any]) -> tuple[Any, Any]:
    return sample["json"], cut(sample["jpg"])


def build(place: str, cache: Path) -> Any:
    dataset = (
        webdataset.WebDataset(tars(place), shardshuffle=100, seed=0, empty_check=False)
        .shuffle(1000)
        .decode("pilrgb")
        .map(tile)
        .batched(BATCH, collation_fn=collate)
    )
    return webdataset.WebLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=PREFETCH)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="webdataset")
    run(write, build, ["webdataset"], SETTINGS)
