"""Where shards live: one small interface, chosen by the scheme of a folder's URL. Local folders, and object stores.

A new kind of storage is a class with the methods of `Storage` and one entry of SCHEMES, which a user's own program may
add too; readers never learn where bytes come from. `pipe:` would run a shell command from a data path and is refused.
"""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from data_pipeline.errors import DataError, LoadError, nearest
from data_pipeline.files import check_name, files_below, must_write, write_atomic
from data_pipeline.masking import mask
from data_pipeline.stores import remote
from data_pipeline.stores.object_storage import HubStorage, ObjectStorage

MAX_OPEN_FILES = 128
log = logging.getLogger(__name__)
RETRY_SECONDS = (1.0, 5.0, 25.0)
"""Waits before a read that failed is tried again: network file systems hiccup, and handles go stale."""


class Storage(Protocol):
    """One folder of shards. Names are relative POSIX paths; every method raises DataError when a name is missing."""

    url: str

    def open(self, name: str) -> BinaryIO:
        """A stream over the whole object, from its first byte."""
        ...

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; LoadError when the object is shorter, or cannot be read after some tries."""
        ...

    def read(self, name: str) -> bytes:
        """The whole object."""
        ...

    def list(self, suffix: str = "") -> Iterator[str]:
        """Names that end in `suffix`, sorted."""
        ...

    def size(self, name: str) -> int: ...

    def exists(self, name: str) -> bool: ...

    def write(self, name: str, data: bytes) -> None:
        """Write an object as a whole."""
        ...

    def local_path(self, name: str) -> Path | None:
        """The object as a local file, when it is one (memory mapping, atomic writing)."""
        ...


class LocalStorage:
    """A local folder. Keeps the last files open and reads with `pread`, so forked workers may share it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.folder = _local_folder(url)
        self._files: OrderedDict[str, int] = OrderedDict()

    def open(self, name: str) -> BinaryIO:
        try:
            return open(self._path(name), "rb")
        except OSError as error:
            raise DataError(f"{self._path(name)}: {error.strerror}") from error

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        waits = iter(RETRY_SECONDS)
        while True:
            try:
                data = os.pread(self._descriptor(name), size, offset)
                break
            except OSError as error:
                wait = None if isinstance(error, FileNotFoundError | PermissionError) else next(waits, None)
                if wait is None:
                    raise LoadError(f"{self._path(name)} cannot be read: {error.strerror}") from error
                log.warning("%s cannot be read: %s; trying again in %g s", self._path(name), error.strerror, wait)
                self._forget(name)
                time.sleep(wait)
        if len(data) != size:
            raise LoadError(f"{self._path(name)} has {self.size(name):,} bytes, but {offset + size:,} were indexed")
        return data

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            try:
                return file.read()
            except OSError as error:
                raise LoadError(f"{self._path(name)} cannot be read: {error.strerror}") from error

    def list(self, suffix: str = "") -> Iterator[str]:
        for path in files_below(self.folder):
            if path.name.endswith(suffix):
                yield path.relative_to(self.folder).as_posix()

    def size(self, name: str) -> int:
        try:
            return self._path(name).stat().st_size
        except OSError as error:
            raise DataError(f"{self._path(name)}: {error.strerror}") from error

    def exists(self, name: str) -> bool:
        return self._path(name).is_file()

    def write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with must_write(path, "make room or the folder writable"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)

    def local_path(self, name: str) -> Path | None:
        return self._path(name)

    def close(self) -> None:
        """Close every file that is kept open."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, object]:
        return {"url": self.url, "folder": self.folder, "_files": OrderedDict()}

    def __del__(self) -> None:
        self.close()

    def _path(self, name: str) -> Path:
        return self.folder / check_name(name)

    def _forget(self, name: str) -> None:
        """Open the file anew next time."""
        descriptor = self._files.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def _descriptor(self, name: str) -> int:
        descriptor = self._files.get(name)
        if descriptor is None:
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC)
            self._files[name] = descriptor
            if len(self._files) > MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(name)
        return descriptor


SCHEMES: dict[str, Callable[[str], Storage]] = {
    "": LocalStorage,
    "file": LocalStorage,
    **dict.fromkeys(remote.SCHEMES, ObjectStorage),
    "hf": HubStorage,
}
"""Scheme of a URL -> its storage, made from the URL. Storages are pickled on their way to loader processes."""


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """The storage behind a folder's path or URL. Raises DataError for schemes that are unknown or refused."""
    text = os.fspath(url)
    scheme = _scheme(text)
    if scheme in SCHEMES:
        return SCHEMES[scheme](text)
    if scheme == "pipe":
        raise DataError(
            f"{text!r}: a pipe: URL runs a shell command and is refused in data paths; copy the shards by that command "
            "to a folder, and run `alignvlm data index FOLDER`"
        )
    raise DataError(f"{mask(text)!r}: unknown scheme: {nearest(scheme, [name for name in SCHEMES if name])}")


def _scheme(url: str) -> str:
    head, separator, _ = url.partition(":")
    if not separator or "/" in head or len(head) < 2:
        return ""
    return head.lower()


def _local_folder(url: str) -> Path:
    if not url.startswith("file:"):
        return Path(url)
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise DataError(f"{url!r} names the host {parts.netloc!r}; file:// URLs are local, as in file:///data/shards")
    return Path(unquote(parts.path))
