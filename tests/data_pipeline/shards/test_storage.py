"""Storages: shells refused, failing reads tried again, and one more kind of storage added from outside."""

from __future__ import annotations

import errno
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards import storage as storage_module
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.storage import SCHEMES, open_storage

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

    def write(self, name: str, data: bytes) -> None:
        OBJECTS[name] = data

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


def test_storage_refuses_shells_and_unknown_schemes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shell"):
        open_storage("pipe:cat /etc/passwd")
    with pytest.raises(DataError, match="unknown scheme: did you mean 's3'"):
        open_storage("s4://bucket/x")
    (tmp_path / "x y").mkdir()
    (tmp_path / "x y" / "a.txt").write_text("hello")
    for url in (str(tmp_path / "x y"), f"file://{tmp_path}/x%20y"):
        storage = open_storage(url)
        assert storage.read_range("a.txt", 1, 3) == b"ell"
        assert list(storage.list(".txt")) == ["a.txt"]
        with pytest.raises(DataError, match="leaves"):
            storage.read("../secret")


def test_reads_that_fail_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(storage_module, "RETRY_SECONDS", (0, 0))
    (tmp_path / "a.txt").write_text("hello")
    storage, failures, read = open_storage(tmp_path), [errno.EIO, errno.ESTALE], os.pread

    def pread(descriptor: int, size: int, offset: int) -> bytes:
        if failures:
            raise OSError(failures[0], os.strerror(failures.pop(0)))
        return read(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert storage.read_range("a.txt", 1, 3) == b"ell"
    said = caplog.text
    assert "a.txt cannot be read: Input/output error; trying again in 0 s" in said
    assert "Stale file handle" in said
    failures += [errno.EIO] * 3
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Input/output error"):
        storage.read_range("a.txt", 1, 3)
    with pytest.raises(DataError, match=r"a\.txt has 5 bytes, but 33 were indexed"):
        storage.read_range("a.txt", 3, 30)
    with pytest.raises(DataError, match=r"b\.txt cannot be read: No such file"):
        storage.read_range("b.txt", 3, 30)
