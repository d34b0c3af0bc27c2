"""Files and folders in object stores, for importers: what they call of pathlib.Path, by ranged requests."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

from data_pipeline.errors import DataError
from data_pipeline.shards.storage import open_storage
from data_pipeline.stores.object_storage import ObjectFile, ObjectStorage

BUFFER_BYTES = 4 * 1024**2
"""Bytes of one request for a file that is read line by line."""


@dataclass(frozen=True, eq=False)
class FarPath:
    """A file or folder: `name` is its path in the folder that `storage` is; "" is that folder. May be pickled."""

    storage: ObjectStorage
    path: str = ""

    def __str__(self) -> str:
        return f"{self.storage}/{self.path}".rstrip("/")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FarPath) and (self.storage.url, self.path) == (other.storage.url, other.path)

    def __hash__(self) -> int:
        return hash((self.storage.url, self.path))

    def __lt__(self, other: FarPath) -> bool:
        return PurePosixPath(self.path) < PurePosixPath(other.path)  # by folders, as pathlib.Path

    def __truediv__(self, name: str) -> FarPath:
        return FarPath(self.storage, PurePosixPath(self.path, name).as_posix())  # "./a//b" is a/b, as on disk

    @property
    def name(self) -> str:
        return PurePosixPath(str(self)).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.path).suffix

    @property
    def parent(self) -> FarPath:
        return FarPath(self.storage, self.path.rpartition("/")[0])

    def relative_to(self, folder: FarPath) -> PurePosixPath:
        return PurePosixPath(self.path).relative_to(folder.path)

    def is_file(self) -> bool:
        return bool(self.path) and self.storage.exists(self.path)

    def is_dir(self) -> bool:
        return next(self.rglob("*"), None) is not None if self.path else not self.storage.is_empty()

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def rglob(self, pattern: str) -> Iterator[FarPath]:
        """The files below a folder, sorted; the only pattern is `*`."""
        assert pattern == "*"
        inside = f"{self.path}/" if self.path else ""
        yield from (FarPath(self.storage, name) for name in self.storage.list() if name.startswith(inside))

    def read_bytes(self, most: int | None = None) -> bytes:
        """The whole file. Raises TooLargeError for more than `most` bytes."""
        return self.storage.read(self.path, most)

    def open(self, mode: str = "rb", buffering: int = BUFFER_BYTES) -> BinaryIO:
        """A stream that may be moved; each request reads as much as the buffer holds, without one as much as asked."""
        assert mode == "rb"
        file = _FarFile(self.storage, self.path)
        return cast(BinaryIO, io.BufferedReader(file, buffering) if buffering else file)


AnyPath = Path | FarPath


def relative(file: AnyPath, folder: AnyPath) -> PurePosixPath:
    """The path of a file in a folder of the same kind."""
    return PurePosixPath(file.relative_to(folder))  # type: ignore[arg-type]


def any_path(text: str | AnyPath, suffixes: tuple[str, ...]) -> AnyPath:
    """The file or folder of a path or URL, or itself. Only a URL that ends in one of `suffixes` can be a file's.

    Raises:
        DataError: a scheme that is unknown or refused.
    """
    if not isinstance(text, str) or "://" not in text:
        return text if isinstance(text, FarPath) else Path(text)
    folder, _, name = text.rstrip("/").rpartition("/")
    storage = open_storage(text)
    if not isinstance(storage, ObjectStorage):
        local = storage.local_path("x")
        if local is None:
            raise DataError(f"{text}: files are read from disk and from object stores only")
        return local.parent
    if name.lower().endswith(suffixes):
        beside = open_storage(folder)
        assert isinstance(beside, ObjectStorage)
        if beside.exists(name):
            return FarPath(beside, name)
    return FarPath(storage)


class _FarFile(ObjectFile):
    """Each read is one request of exactly these bytes."""

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(self._size - self._position, 0))
        buffer[:count] = self._storage.read_range(self._name, self._position, count)
        self._position += count
        return count
