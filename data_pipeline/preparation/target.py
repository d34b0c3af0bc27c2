"""Where a dataset's new shards go: a local folder, or one in an object store.

A local folder is `<folder>.partial` until the last shard is there, and then gets its name. In an object store shards
lie where they stay; its manifest, which comes last, makes a folder of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from data_pipeline.errors import DataError
from data_pipeline.files import locked, must_write, write_atomic
from data_pipeline.preparation.engines import Engine, run
from data_pipeline.progress import Progress
from data_pipeline.shards.index import index_digest, save_manifest
from data_pipeline.shards.manifest import Manifest, ShardInfo
from data_pipeline.shards.sidecars import index_name, writable_place
from data_pipeline.shards.storage import LocalStorage, Storage, open_storage
from data_pipeline.stores.folders import ETAGS, MANIFEST, node_folder
from data_pipeline.stores.object_storage import ObjectStorage
from data_pipeline.stores.remote import check_writable

PLAN = "write-plan.json"
WAY_OUT = "choose a folder that can be written and has room"
_ROOM = "make room, or let ALIGNVLM_CACHE name another folder"
_LOOKED_AT = 128
"""Shards that a task looks at."""
WRITING = "writing"
"""Folder of a node's cache for shards on their way to an object store."""


def rejected_name(shard: str) -> str:
    """Name of the file with the rows that could not go into a shard."""
    return f"{shard.removesuffix('.tar')}.rejected.jsonl"


class Target(Protocol):
    """A folder of new shards. Its `str` is for errors. May be pickled."""

    @property
    def name(self) -> str:
        """Name of the source that the folder becomes."""
        ...

    @property
    def storage(self) -> Storage:
        """Where a finished folder is read."""
        ...

    def is_finished(self) -> bool:
        """Whether its manifest was written, with the plan that it followed."""
        ...

    def claim(self) -> AbstractContextManager[None]:
        """Open around making the plan; one process at a time. Raises DataError when the folder holds something else."""
        ...

    def names(self) -> set[str]:
        """The files that are there, by one listing."""
        ...

    def read(self, name: str) -> bytes: ...

    def create(self, name: str, data: bytes) -> None:
        """Write a file unless it is there."""
        ...

    def room(self, shard: str) -> AbstractContextManager[Path]:
        """A local folder for a shard, its index and its rejected rows: they are in the target when the block ends."""
        ...

    def rows(self, shards: Sequence[str], engine: Engine, progress: Progress) -> list[tuple[ShardInfo, str]]:
        """Each shard's line of the manifest, from its index, and its ETag. Raises DataError when one does not fit."""
        ...

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, last."""
        ...


@dataclass(frozen=True)
class LocalTarget:
    """A local or shared folder, whose path is absolute."""

    folder: Path

    def __str__(self) -> str:
        return str(self.place)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def storage(self) -> Storage:
        return LocalStorage(str(self.folder))

    @property
    def place(self) -> Path:
        """Where its files are now."""
        return self.folder if self.is_finished() else self.folder.with_name(f"{self.name}.partial")

    def is_finished(self) -> bool:
        return (self.folder / PLAN).exists()

    @contextmanager
    def claim(self) -> Iterator[None]:
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise _not_empty(str(self.folder))
        with must_write(self.place, WAY_OUT):
            self.place.mkdir(parents=True, exist_ok=True)
        with locked(self.place / ".lock", "choose a folder that can be written"):
            yield

    def names(self) -> set[str]:
        return set(os.listdir(self.place))

    def read(self, name: str) -> bytes:
        return (self.place / name).read_bytes()

    def create(self, name: str, data: bytes) -> None:  # where `claim` holds
        with must_write(self.place / name, WAY_OUT):
            write_atomic(self.place / name, data)

    @contextmanager
    def room(self, shard: str) -> Iterator[Path]:
        yield self.place

    def rows(self, shards: Sequence[str], engine: Engine, progress: Progress) -> list[tuple[ShardInfo, str]]:
        return [(self._row(shard), "") for shard in shards]

    def _row(self, shard: str) -> ShardInfo:
        path = self.place / shard
        return _row(f"{path}", shard, self.read(index_name(shard)), path.stat().st_size if path.is_file() else -1)

    def finish(self, manifest: Manifest) -> None:
        place = self.place
        with must_write(self.folder, WAY_OUT):
            for name in os.listdir(place):
                if name == ".lock" or (name.startswith(".") and name.endswith(".tmp")):
                    (place / name).unlink(missing_ok=True)
            manifest.save(place)
            if self.folder.exists():
                self.folder.rmdir()
            place.rename(self.folder)


@dataclass(frozen=True)
class FarTarget:
    """A folder in an object store. A shard is made in the node's cache first, and deleted there when it has come."""

    storage: ObjectStorage

    def __str__(self) -> str:
        return str(self.storage)

    @property
    def name(self) -> str:
        return self.storage.url.rsplit("/", 1)[-1]

    @property
    def _writing(self) -> Path:
        return node_folder(self.storage.url) / WRITING

    def is_finished(self) -> bool:
        return self.storage.exists(MANIFEST) and self.storage.exists(PLAN)

    @contextmanager
    def claim(self) -> Iterator[None]:
        names = self.names() - {ETAGS}  # of `data write` in another way, which was killed before it uploaded anything
        if names and PLAN not in names:
            raise _not_empty(str(self))
        with locked(self._writing / ".lock", _ROOM):
            yield

    def names(self) -> set[str]:
        return set(self.storage.list())

    def read(self, name: str) -> bytes:
        return self.storage.read(name)

    def create(self, name: str, data: bytes) -> None:
        self.storage.write_over(name, data, None)

    @contextmanager
    def room(self, shard: str) -> Iterator[Path]:
        room, rejected, index = self._writing / shard.removesuffix(".tar"), rejected_name(shard), index_name(shard)
        with locked(room.with_suffix(".lock"), _ROOM):
            with must_write(room, _ROOM):
                shutil.rmtree(room, ignore_errors=True)  # of a process that was killed
                room.mkdir()
            try:
                yield room
                files = [shard, *([rejected] if (room / rejected).is_file() else []), index]
                if rejected not in files and self.storage.exists(rejected):  # it was begun before images were mended
                    self.storage.write(rejected, b"")
                self.storage.upload([(name, room / name) for name in files])
            finally:
                shutil.rmtree(room, ignore_errors=True)

    def rows(self, shards: Sequence[str], engine: Engine, progress: Progress) -> list[tuple[ShardInfo, str]]:
        parts = [shards[begin : begin + _LOOKED_AT] for begin in range(0, len(shards), _LOOKED_AT)]
        found = run(partial(_far_rows, self.storage), parts, engine, title="look at the shards", progress=progress)
        return sorted((row for rows in found for row in rows), key=lambda row: row[0].name)

    def finish(self, manifest: Manifest) -> None:
        save_manifest(self.storage, writable_place(self.storage), manifest)
        shutil.rmtree(self._writing, ignore_errors=True)


def open_target(folder: str | os.PathLike[str]) -> Target:
    """The folder of a path or URL. Raises DataError for what can never be written."""
    storage = open_storage(folder)
    if isinstance(storage, ObjectStorage):
        check_writable(storage.url)
        return FarTarget(storage)
    path = storage.local_path("x")
    if path is None:
        raise DataError(f"{folder}: shards are written to folders and object stores only")
    return LocalTarget(path.parent.absolute())


def _far_rows(storage: ObjectStorage, shards: Sequence[str]) -> list[tuple[ShardInfo, str]]:
    looked = zip(shards, storage.heads(shards), storage.reads(map(index_name, shards)), strict=True)
    return [(_row(f"{storage}/{shard}", shard, index, info.size), info.etag) for shard, info, index in looked]


def _row(place: str, shard: str, index: bytes, size: int) -> ShardInfo:
    digest = index_digest(index)
    header = json.loads(index.partition(b"\n")[0]) if digest else {}
    if header.get("size") != size:
        raise DataError(f"{place} does not fit its index; delete {index_name(place)}, run it again")
    return ShardInfo(shard, header["samples"], size, digest)


def _not_empty(place: str) -> DataError:
    return DataError(f"{place} is not empty; choose another folder or delete it")
