"""A tiny encoder, synthetic sources and small folders of real shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipeline.decode import SourceReader
from data_pipeline.schema import Encoded, Sample, SampleError
from data_pipeline.sources import Source, measure_source, open_source
from data_pipeline.writer import write_shards

TILE = 8


class LetterEncoder:
    """One token per letter, four per image, one tile per image; the assistant's letters are learnt."""

    fingerprint = "letters-1"
    tile_size = TILE

    def measure(self, messages: Any, image_sizes: Any) -> tuple[int, int]:
        parts = [part for message in messages for part in message["content"]]
        return sum(len(part.get("text", "....")) for part in parts), len(image_sizes)

    def encode(self, sample: Sample) -> Encoded:
        if sample.meta.get("refuse"):
            raise SampleError("asked to refuse")
        ids: list[int] = []
        labels: list[int] = []
        for message in sample.messages:
            for part in message["content"]:
                new = [ord(letter) for letter in part["text"]] if "text" in part else [1] * 4
                ids += new
                labels += new if message["role"] == "assistant" else [-100] * len(new)
        tiles = [np.asarray(image.resize((TILE, TILE))).transpose(2, 0, 1) for image in sample.images]
        stacked = np.stack(tiles) if tiles else np.zeros((0, 3, TILE, TILE), np.uint8)
        return Encoded(np.asarray(ids, np.int64), np.asarray(labels, np.int64), stacked)


def make_records(count: int, name: str = "s", **meta: Any) -> Iterator[dict[str, Any]]:
    """Conversations of different lengths with zero to two images."""
    for i in range(count):
        images = [Image.new("RGB", (10 + i % 5, 12), (i % 256, 10 * j, 0)) for j in range(i % 3)]
        yield {
            "key": f"{name}{i:05d}",
            "messages": [
                {"role": "user", "content": "<image>" * len(images) + f"number {i}"},
                {"role": "assistant", "content": "x" * (1 + i * 7 % 41)},
            ],
            "images": images,
            "task": "count",
            **meta,
        }


def make_source(
    count: int, name: str = "a", per_shard: int = 50, longest: int = 900, zeros: int = 0
) -> SimpleNamespace:
    """A source for plans only: reproducible lengths, no shards."""
    digest = np.frombuffer(hashlib.shake_256(name.encode()).digest(count * 2), dtype="<u2").astype(np.int64)
    measures = np.stack([20 + digest % (longest - 19), digest % 7], axis=1).astype(np.uint32)
    measures[:zeros, 0] = 0
    starts = np.minimum(np.arange(0, count + per_shard, per_shard), count).astype(np.int64)
    return SimpleNamespace(fingerprint=f"{name}-{count}", measures=measures, shard_starts=starts)


@pytest.fixture(scope="session")
def encoder() -> LetterEncoder:
    return LetterEncoder()


@pytest.fixture(scope="session")
def records() -> Any:
    return make_records


@pytest.fixture(scope="session")
def synthetic() -> Any:
    return make_source


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 samples in 8 shards; read only."""
    folder = tmp_path_factory.mktemp("data") / "letters"
    write_shards(make_records(300), folder, samples_per_shard=40, num_processes=1)
    return folder


@pytest.fixture(scope="session")
def source(shard_folder: Path, encoder: LetterEncoder) -> Source:
    measure_source(shard_folder, encoder, num_processes=1)
    return open_source("letters", shard_folder, encoder)


@pytest.fixture
def reader(shard_folder: Path) -> SourceReader:
    return SourceReader(shard_folder)
