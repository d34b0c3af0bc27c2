"""A folder of an object store, for readers of shards: ranged reads of pinned objects, streams, lists, writes."""

from __future__ import annotations

import io
import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from data_pipeline.errors import DataError, LoadError
from data_pipeline.files import check_name
from data_pipeline.masking import mask
from data_pipeline.stores import hub
from data_pipeline.stores.failures import ExistsError, MissingObjectError, NoRangesError, ReplacedError
from data_pipeline.stores.folders import canonical
from data_pipeline.stores.helper import ask, ask_many, submit
from data_pipeline.stores.remote import ObjectInfo
from data_pipeline.stores.requests import PART_BYTES, Delete, Download, Get, Head, Listing, Put, Tree, Upload

PARTS_AHEAD = 4
UPLOADS, READS = 4, 32
"""Files that a process uploads at a time, each with four parts in memory (remote.py); small objects read or deleted."""


class ObjectStorage:
    """A folder behind an `s3:`, `gs:`, `az:` or `http:` URL (fulfils `shards.storage.Storage`). May be pickled.

    Each object is pinned: to the size and ETag that `pin` names, else to what the first answer of this process says.
    A read of another one raises ReplacedError.
    """

    def __init__(self, url: str) -> None:
        self.url = canonical(url)
        if not re.match(r"[^:]+://[^/]", self.url):
            raise DataError(f"{url!r} names no bucket, container or host, as in s3://bucket/folder")
        self.pins: dict[str, ObjectInfo] = {}
        self._etags: Mapping[str, str] = {}
        self._sizes: Mapping[str, int] = {}
        self._known: dict[str, tuple[str, int | None]] = {}
        """ETags and sizes as `request` found them: it is asked for every sample."""

    def __str__(self) -> str:
        return mask(self.url)

    def place(self) -> str:
        """The URL that requests name."""
        return self.url

    def pin(self, sizes: Mapping[str, int], etags: Mapping[str, str]) -> None:
        """What objects must be: their sizes, and ETags where they are known."""
        self._sizes, self._etags, self._known = sizes, etags, {}

    def request(self, name: str, begin: int, end: int, hedged: bool = False) -> Get:
        """The request of a range, which is refused when the object is another one than before."""
        known = self._known.get(name)
        if known is None:
            seen = self.pins.get(name)
            etag = self._etags.get(name) or (seen.etag if seen else "")
            known = etag, self._sizes.get(name, seen.size if seen else None)
            if seen or etag:
                self._known[check_name(name)] = known
        return Get(self.place(), check_name(name), begin, end, *known, hedged=hedged)

    def pinned_size(self, name: str) -> int:
        """The size that an object must have, which `pin` has named or an answer."""
        return self._sizes[name] if name in self._sizes else self.pins[name].size

    def download(self, name: str, path: Path) -> None:
        """Write a pinned object into a file that is there. Raises NoRoomError when the disk is full."""
        size = self.pinned_size(name)
        self.answered(name, ask(Download(self.request(name, 0, size), str(path))))

    def answers_ranges(self, name: str) -> bool:
        """Whether the server answers ranged requests, which is asked of a web server only."""
        if not self.url.startswith(("http:", "https:")):
            return True
        try:
            ask(self.request(name, 0, 1))
        except NoRangesError:
            return False
        return True

    def answered(self, name: str, info: ObjectInfo) -> None:
        """Pin an object to its first answer."""
        self.pins.setdefault(name, info)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        if size == 0:
            return b""
        data, info = ask(self.request(name, offset, offset + size))
        self.answered(name, info)
        return cast(bytes, data)

    def read(self, name: str, most: int | None = None) -> bytes:
        """The whole object. Raises TooLargeError, before it is read, for one of more than `most` bytes."""
        return cast(bytes, ask(Get(self.place(), check_name(name), most=most))[0])

    def open(self, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(_Stream(self, name), 1 << 20))

    def list(self, suffix: str = "") -> Iterator[str]:
        return iter(self.listing(suffix))

    def listing(self, suffix: str = "") -> dict[str, ObjectInfo]:
        """What objects there are now, by name, sorted. An ETag is to be compared by `ObjectInfo.matches` only."""
        return cast(dict[str, ObjectInfo], ask(Listing(self.place(), suffix)))

    def listed(self, suffix: str = "") -> dict[str, ObjectInfo]:
        """`listing`, and nothing for a web server, which rarely lists a folder."""
        try:
            return self.listing(suffix)
        except LoadError:
            if self.url.startswith(("http:", "https:")):
                return {}
            raise

    def is_empty(self) -> bool:
        """Whether the folder has no objects."""
        return not ask(Listing(self.place(), "", 1))

    def head(self, name: str) -> ObjectInfo:
        """Size and ETag of an object as it is now. Raises DataError when there is none."""
        return cast(ObjectInfo, ask(Head(self.place(), check_name(name))))

    def heads(self, names: Iterable[str]) -> Iterator[ObjectInfo]:
        """`head` of many objects, in their order."""
        return ask_many((Head(self.place(), check_name(name)) for name in names), READS)

    def reads(self, names: Iterable[str]) -> Iterator[bytes]:
        """`read` of many objects, in their order."""
        return (data for data, _ in ask_many((Get(self.place(), check_name(name)) for name in names), READS))

    def size(self, name: str) -> int:
        return self.head(name).size

    def exists(self, name: str) -> bool:
        try:
            self.head(name)
        except MissingObjectError:
            return False
        return True

    def write(self, name: str, data: bytes) -> None:
        ask(Put(self.place(), check_name(name), data))

    def write_over(self, name: str, data: bytes, old: bytes | None) -> bool:
        """Write an object where it is still `old` (null: where there is none) or gone; False when it is another one.

        Of several that write at once one does. Stores that know no conditions take what comes last.
        """
        over: str | None = ""
        if old is not None:
            with suppress(MissingObjectError):
                now, info = ask(Get(self.place(), check_name(name)))
                if now != old:
                    return bool(now == data)
                over = info.etag or None
        try:
            ask(Put(self.place(), check_name(name), data, over))
        except (ExistsError, ReplacedError, MissingObjectError):
            return self.read(name) == data  # it may have come by the first try of this request
        return True

    def upload(self, *chains: Sequence[tuple[str, Path]]) -> None:
        """Write local files as objects: several chains of (name, path) at a time, each one file after the other.

        When one fails, those of the chains before it have come.
        """
        files = ([(check_name(name), str(path)) for name, path in chain] for chain in chains)
        for _ in ask_many((Upload(self.place(), each) for each in files), UPLOADS):
            pass

    def delete(self, *names: str) -> None:
        for _ in ask_many((Delete(self.place(), check_name(name)) for name in names), READS):
            pass

    def local_path(self, name: str) -> Path | None:
        return None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pins": dict(self.pins), "_known": {}}


class HubStorage(ObjectStorage):
    """A folder behind `hf://datasets/ORGANISATION/NAME[@REVISION][/FOLDER]`. May be pickled, and then stays pinned.

    A branch or tag is looked up once: everything after is read at the commit that it was, and nothing changes there.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        hub.parse(self.url)
        self._seen: tuple[str, dict[str, ObjectInfo]] | None = None

    def place(self) -> str:
        return self._look()[0]

    def pin(self, sizes: Mapping[str, int], etags: Mapping[str, str]) -> None:
        """Compare the files with those that were indexed. Raises ReplacedError."""
        super().pin(sizes, etags)
        files = self._look()[1]  # before any fork, so that all loader processes read one commit
        for name, etag in etags.items():
            now = files.get(name)
            if now is None or now.etag != etag:
                is_now = "is gone" if now is None else f"now {now.size:,} bytes, {now.etag[:12]}"
                raise ReplacedError(
                    f"{self}/{name} was replaced since it was indexed ({sizes.get(name, 0):,} bytes, {etag[:12]}; "
                    f"{is_now}); name the commit that was indexed in the URL, or run `alignvlm data index {self}`"
                )

    def listing(self, suffix: str = "") -> dict[str, ObjectInfo]:
        return {name: info for name, info in sorted(self._look()[1].items()) if name.endswith(suffix)}

    def is_empty(self) -> bool:
        return not self._look()[1]

    def head(self, name: str) -> ObjectInfo:
        """Size of a file, and the hash of its content as ETag."""
        found = self._look()[1].get(name)
        if found is None:
            raise MissingObjectError(f"{self}/{name}: no such object")
        return found

    def heads(self, names: Iterable[str]) -> Iterator[ObjectInfo]:
        return map(self.head, names)

    def _look(self) -> tuple[str, dict[str, ObjectInfo]]:
        if self._seen is None:
            self._seen = ask(Tree(hub.at_commit(self.url)))
            hub.hold(self.url, self._seen[0])
        return self._seen


class ObjectFile(io.RawIOBase):
    """An object, pinned, with a position that may be moved. Who derives from it says how it is read."""

    def __init__(self, storage: ObjectStorage, name: str) -> None:
        info = storage.head(name)
        storage.answered(name, info)
        self._storage, self._name, self._size, self._position = storage, name, info.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position


class _Stream(ObjectFile):
    """An object from front to end, some parts ahead; a jump elsewhere costs what was read ahead."""

    def __init__(self, storage: ObjectStorage, name: str) -> None:
        super().__init__(storage, name)
        self._next = 0
        self._ahead: deque[tuple[int, Future[Any]]] = deque()
        self._part: tuple[int, bytes] = (0, b"")

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._size:
            return 0
        begin, part = self._part
        if not begin <= self._position < begin + len(part):
            begin, part = self._part = self._fetch(self._position - self._position % PART_BYTES)
        piece = part[self._position - begin : self._position - begin + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        while self._ahead:
            self._ahead.pop()[1].cancel()
        super().close()

    def _fetch(self, begin: int) -> tuple[int, bytes]:
        while self._ahead and self._ahead[0][0] != begin:
            self._ahead.popleft()[1].cancel()
        if not self._ahead:
            self._next = begin
        while len(self._ahead) < PARTS_AHEAD and self._next < self._size:
            end = min(self._next + PART_BYTES, self._size)
            self._ahead.append((self._next, submit(self._storage.request(self._name, self._next, end))))
            self._next = end
        data = self._ahead.popleft()[1].result()[0]
        if not data:
            raise DataError(f"{self._storage}/{self._name}: the store sent none of its bytes")
        return begin, data
