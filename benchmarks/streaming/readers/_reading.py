"""What the readers of this folder share: the images, how they are decoded, and what a pass over them takes.

A reader is a script for one library. It runs under the Python of that library's own environment, so nothing here
imports this project, and says in a line of JSON what happened:

    python read_webdataset.py write IMAGES FOLDER     the library's own format, by the library's own writer
    python read_webdataset.py read PLACE CACHE        one epoch from a folder or an s3:// URL, CACHE being empty
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

BATCH = 16
"""Images per batch."""
PREFETCH = 4
"""Batches that the loader process keeps ready."""
SHARD_BYTES = 64_000_000
"""Of one shard: what litdata and MosaicML streaming take by default."""
TILE = 364

Sample = tuple[str, bytes, bytes]
"""Key, JPEG file, JSON of the conversation."""


def samples(folder: Path) -> Iterator[Sample]:
    """The images of a folder that the benchmark wrote, in order."""
    for path in sorted(folder.glob("*.jpg")):
        yield path.stem, path.read_bytes(), path.with_suffix(".json").read_bytes()


def decode(jpeg: bytes) -> Image.Image:
    """All pixels, RGB, by PIL."""
    return Image.open(BytesIO(jpeg)).convert("RGB")


def cut(image: Image.Image) -> np.ndarray:
    """The first tile, uint8 [3, S, S]: what goes from the loader process to the training process."""
    return np.ascontiguousarray(np.asarray(image.crop((0, 0, TILE, TILE))).transpose(2, 0, 1))


def collate(batch: list[tuple[Any, np.ndarray]]) -> tuple[list[Any], torch.Tensor]:
    """Conversations, and tiles uint8 [K, 3, S, S]."""
    records, tiles = zip(*batch, strict=True)
    return list(records), torch.from_numpy(np.stack(tiles))


def cpu_seconds() -> float:
    """CPU time so far of this process and of all that it started, and they; those that have ended count too."""
    ticks, waiting = 0, [os.getpid()]
    while waiting:
        folder = Path(f"/proc/{waiting.pop()}")
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            for thread in (folder / "task").iterdir():
                waiting += map(int, (thread / "children").read_text().split())
        except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile: its parent has its time
            continue
        ticks += sum(map(int, fields[11:15]))  # user and system, its own and of its children that were waited for
    return ticks / os.sysconf("SC_CLK_TCK")


def take_pass(loader: Iterable[Any]) -> dict[str, float]:
    """One epoch of batches: (…, tiles) each. The pixels' sum says whether all images came and came right.

    `rate` (images per second) and `cpu` (seconds) are of all, from starting the loader process to the last image: some
    libraries decode many images before the first batch. `start`: seconds to that batch.
    """
    cpu, began = cpu_seconds(), time.perf_counter()
    first, images, pixels = 0.0, 0, 0
    for *_, tiles in loader:
        last = time.perf_counter()
        first = first or last
        images += len(tiles)
        pixels += pixel_sum(tiles)
    return {
        "images": images,
        "pixels": pixels,
        "rate": images / (last - began),
        "start": first - began,
        "cpu": cpu_seconds() - cpu,
    }


def pixel_sum(tiles: torch.Tensor) -> int:
    """Of every seventh row and column: costs next to nothing, and no two of the images have the same."""
    return int(tiles[:, :, ::7, ::7].sum(dtype=torch.int64))


def run(
    write: Callable[[Path, Path], None],
    build: Callable[[str, Path], Iterable[Any]],
    packages: Iterable[str],
    settings: dict[str, Any],
) -> None:
    """The command line of a reader.

    Args:
        write: (images, folder): fills the folder.
        build: (place, empty cache): a loader, which gives one epoch of batches with tiles uint8 [K, 3, S, S] last.
        packages: whose versions matter.
        settings: what a user of the library would choose, for the result.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["write", "read"])
    parser.add_argument("source")
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if arguments.what == "write":
        write(Path(arguments.source), arguments.folder)
        return
    began = time.perf_counter()
    loader = build(arguments.source, arguments.folder)
    facts: dict[str, Any] = {"build": time.perf_counter() - began, **take_pass(loader)}
    facts |= {"versions": {name: importlib.metadata.version(name) for name in (*packages, "torch", "pillow", "numpy")}}
    print(json.dumps({**facts, "settings": {"batch": BATCH, "prefetch": PREFETCH, **settings}}), flush=True)
    os._exit(0)  # some libraries leave threads or processes that would wait
