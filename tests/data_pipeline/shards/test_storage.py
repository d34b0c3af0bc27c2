"""Storages: shells refused, failing reads tried again, and one more kind of storage added from outside."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.storage import SCHEMES

OBJECTS: dict[str, bytes] = {}


class MemoryStorage:
    """Objects of this process under `memory:`, as a user's own storage would be written."""

    def __init__(self, url: str) -> None:
        self.url = url

    def read(self, name: str) -> bytes:
        if name not in OBJECTS:
            raise DataError(f"{self.url}: no {name}")
        return OBJECTS[name]

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        return self.read(name)[offset : offset + size]

    def list(self, suffix: str = "") -> Iterator[str]:
        return iter(sorted(name for name in OBJECTS if name.endswith(suffix)))

    def size(self, name: str) -> int:
        return len(self.read(name))

    def exists(self, name: str) -> bool:
        return name in OBJECTS

    def local_path(self, name: str) -> Path | None:
        return None


def test_a_storage_from_outside_is_read_like_a_folder(shard_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, "memory", MemoryStorage)
    for path in shard_folder.iterdir():
        monkeypatch.setitem(OBJECTS, path.name, path.read_bytes())
    here, there = SourceReader(shard_folder), pickle.loads(pickle.dumps(SourceReader("memory://letters")))
    assert len(there) == len(here) == 300
    for number in (0, 41, 299):
        assert there[number].messages == here[number].messages
        assert [image.tobytes() for image in there[number].images] == [i.tobytes() for i in here[number].images]
