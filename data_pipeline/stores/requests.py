"""Requests as values: what a worker process does itself and other processes ask their helper to do.

Every request is tried again until the store answers or patience ends (5 minutes): one warning a minute per node.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from data_pipeline.errors import LoadError
from data_pipeline.masking import mask
from data_pipeline.stores import remote
from data_pipeline.stores.failures import (
    BrokenOffError,
    MissingObjectError,
    NoRangesError,
    NoRoomError,
    ReplacedError,
    TransientError,
)
from data_pipeline.stores.remote import ObjectInfo
from data_pipeline.stores.waiting.patience import Failed, patiently

T = TypeVar("T")
PART_BYTES = 16 * 1024**2
"""Bytes of one request for an object that is read from front to end."""
DOWNLOAD_BYTES, DOWNLOAD_PARTS = 64 * 1024**2, 8
"""The most bytes of one request for an object that goes to a file, and how many such requests are made at a time."""


@dataclass(frozen=True)
class Get:
    """Bytes [begin, end) of an object, with what it is now; all of it where `end` is None.

    Raises ReplacedError when its ETag is not `etag`, or its size is not `size`, and TooLargeError when that is more
    than `most`, where these are given.
    """

    url: str
    name: str
    begin: int = 0
    end: int | None = None
    etag: str = ""
    size: int | None = None
    unless: str = ""
    most: int | None = None
    hedged: bool = False
    """Whether somebody waits for it, as for a sample: waiting/late.py reads it, a second time when it is late."""

    async def run(self, failed: Failed | None = None) -> tuple[bytes, ObjectInfo]:
        data, info = await self.checked(self._read, failed)
        if self.end is not None and len(data) != self.end - self.begin:
            raise LoadError(f"{mask(self.url)}/{self.name}: {len(data):,} of {self.end - self.begin:,} bytes came")
        return data, info

    async def checked(
        self, read: Callable[[], Awaitable[tuple[T, ObjectInfo]]], failed: Failed | None = None, is_long: bool = False
    ) -> tuple[T, ObjectInfo]:
        """What `read` gives, tried again as `patiently` says. Raises ReplacedError or MissingObjectError."""
        try:
            data, info = await patiently(self.url, self.name, read, failed, is_long)
        except ReplacedError as error:
            now = await patiently(self.url, self.name, lambda: remote.head(self.url, self.name))
            raise self._replaced(now) from error
        except NoRangesError as error:
            now = await patiently(self.url, self.name, lambda: remote.head(self.url, self.name))
            if self.size not in (None, now.size):  # perhaps not even the store's answer
                raise self._replaced(now) from error
            raise
        except MissingObjectError as error:
            if self.size is None:
                raise
            raise MissingObjectError(
                f"{mask(self.url)}/{self.name} is gone since it was indexed; put the shard back, "
                f"or run `alignvlm data index {mask(self.url)}`"
            ) from error
        if self.size is not None and info.size != self.size:
            raise self._replaced(info)
        return data, info

    async def _read(self) -> tuple[bytes, ObjectInfo]:
        options: dict[str, Any] = {"etag": self.etag, "unless": self.unless, "most": self.most}
        return await remote.get(self.url, self.name, self.begin, self.end, **options)

    def _replaced(self, now: ObjectInfo) -> ReplacedError:
        was = [f"{self.size:,} bytes"] if self.size is not None else []
        was += [f"etag {self.etag}"] if self.etag else []
        return ReplacedError(
            f"{mask(self.url)}/{self.name} was replaced since it was indexed ({', '.join(was)}; "
            f"now {now.size:,} bytes, etag {now.etag or 'none'}); put the shard back, "
            f"or run `alignvlm data index {mask(self.url)}`"
        )


@dataclass(frozen=True)
class Head:
    """Size and ETag of an object."""

    url: str
    name: str

    async def run(self) -> ObjectInfo:
        return await patiently(self.url, self.name, lambda: remote.head(self.url, self.name))


@dataclass(frozen=True)
class Put:
    """Write an object; its ETag comes back. `over` says what it may replace (remote.put)."""

    url: str
    name: str
    data: bytes
    over: str | None = None

    async def run(self) -> str:
        return await patiently(self.url, self.name, lambda: remote.put(self.url, self.name, self.data, self.over))


@dataclass(frozen=True)
class Upload:
    """Write local files as objects, one after the other."""

    url: str
    files: Sequence[tuple[str, str]]
    """Name and path of each file."""

    async def run(self) -> None:
        for name, path in self.files:
            await patiently(self.url, name, partial(remote.put_file, self.url, name, path), is_long=True)


@dataclass(frozen=True)
class Delete:
    """Delete an object."""

    url: str
    name: str

    async def run(self) -> None:
        await patiently(self.url, self.name, lambda: remote.delete(self.url, self.name))


@dataclass(frozen=True)
class Listing:
    """A folder's objects whose names have a suffix, name -> what it is; about `most` of them, or all."""

    url: str
    suffix: str
    most: int | None = None

    async def run(self) -> dict[str, ObjectInfo]:
        work = partial(remote.listing, self.url, self.suffix, self.most)
        return await patiently(self.url, "", work, is_long=True)


@dataclass(frozen=True)
class Download:
    """A whole object, `whole`, of a known size into a local file, which is on the disk when the request ends.

    In parts, where it is large and the server answers ranges. Raises NoRoomError when the disk is full.
    """

    whole: Get
    path: str

    async def run(self) -> ObjectInfo:
        size = self.whole.size or 0
        file = os.open(self.path, os.O_WRONLY)  # whoever asks has made it
        try:
            try:
                info = await self._in_parts(file, size, num_parts(size))
            except NoRangesError:
                info = await self._in_parts(file, size, 0)
            await asyncio.to_thread(_sync, file)
        finally:
            os.close(file)
        return info

    async def _in_parts(self, file: int, size: int, count: int) -> ObjectInfo:
        """So many ranges, or with 0 all of it without a range. When this ends, nobody writes into the file any more."""
        slots, step = asyncio.Semaphore(DOWNLOAD_PARTS), max(-(-size // max(count, 1)), 1)
        parts = [
            asyncio.ensure_future(self._part(file, begin, min(begin + step, size), slots, whole=not count))
            for begin in range(0, size, step)
        ]
        try:
            infos = await asyncio.gather(*parts)
        finally:
            for part in parts:
                part.cancel()
            await asyncio.gather(*parts, return_exceptions=True)
        return infos[-1] if infos else ObjectInfo(size, self.whole.etag)

    async def _part(self, file: int, begin: int, end: int, slots: asyncio.Semaphore, whole: bool) -> ObjectInfo:
        get, reached = self.whole, begin

        async def read() -> tuple[None, ObjectInfo]:
            nonlocal reached
            with _Writes(file, reached) as writes:
                try:
                    place = get.url, get.name, reached, end, writes.write
                    return None, await _in_thread(partial(remote.get_into, *place, etag=get.etag, whole=whole))
                except TransientError as error:
                    before, reached = reached, begin if whole or writes.reached >= end else writes.reached
                    if reached > before:  # the next try goes on there
                        raise BrokenOffError(str(error)) from error
                    raise

        async with slots:
            return (await get.checked(read, is_long=True))[1]


def num_parts(size: int) -> int:
    """Parts in which a whole object of so many bytes comes."""
    return max(-(-size // DOWNLOAD_BYTES), 1)


class _Writes:
    """What a thread writes into a file from a place on, until the block ends, which does not wait for the thread."""

    def __init__(self, file: int, place: int) -> None:
        self.reached = place
        self._file, self._is_over, self._lock = file, False, threading.Lock()

    def __enter__(self) -> _Writes:
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._is_over = True

    def write(self, data: memoryview, place: int) -> None:
        """Write all of it. Raises NoRoomError, and LoadError when the block has ended."""
        with self._lock:
            if self._is_over:
                raise LoadError("nobody waits for it any more")
            try:
                while data:
                    written = os.pwrite(self._file, data, place)
                    data, place = data[written:], place + written
                self.reached = place
            except OSError as error:
                raise NoRoomError(error.strerror or str(error)) from error


async def _in_thread(work: Callable[[], T]) -> T:
    """What `work` gives in a thread of its own; it goes on when this is cancelled, and the process ends without it."""
    future: Future[T] = Future()

    def run() -> None:
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

    threading.Thread(target=run, name="download", daemon=True).start()
    return await asyncio.wrap_future(future)


def _sync(file: int) -> None:
    try:
        os.fsync(file)
    except OSError as error:  # quotas and network file systems say only here that a disk is full
        raise NoRoomError(error.strerror or str(error)) from error


@dataclass(frozen=True)
class Tree:
    """The files of a folder on the Hub, by name, and its URL with the commit that has them."""

    url: str

    async def run(self) -> tuple[str, dict[str, ObjectInfo]]:
        return await patiently(self.url, "", lambda: remote.tree(self.url), is_long=True)


Request = Get | Head | Put | Upload | Delete | Listing | Download | Tree
