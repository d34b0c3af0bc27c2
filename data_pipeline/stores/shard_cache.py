"""Whole shards on the disk of a node: each fetched by one of its processes, within a limit of bytes.

    <cache>/tars/<hash of URL and content>/<shard>           a whole shard
    <cache>/tars/<hash of URL and content>/<shard>.partial   one that is being fetched, locked by who does

A process that dies frees its lock, and the next one that wants the shard fetches it from the start into the same file.
A file is deleted when the plan has passed it (loading/whole.py), or to make room for another one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum
from pathlib import Path

from data_pipeline.files import check_name, locked, must_write
from data_pipeline.stores.failures import NoRoomError
from data_pipeline.stores.folders import cache_folder
from data_pipeline.stores.object_storage import ObjectStorage
from data_pipeline.stores.waiting.node_notes import raise_if_given_up, warn_once_a_minute

LARGEST_BYTES, FREE_SHARE = 200 * 10**9, 0.75
"""Limits where none is given: the most bytes, and the share of the disk's free space."""
PARTIAL = ".partial"
_WAY_OUT = "make room, or let ALIGNVLM_CACHE name another folder"
Wanted = Callable[[Path], bool]


class Fetched(Enum):
    """What became of a wish for a shard."""

    HERE = "it is on the disk"
    ELSEWHERE = "another process fetches it"
    NO_ROOM = "there is no room for it"


def root() -> Path:
    """The folder of whole shards in this node's cache."""
    return cache_folder() / "tars"


def default_limit() -> int:
    """Bytes that whole shards may take on this node where nobody says."""
    folder = cache_folder()
    return min(LARGEST_BYTES, int(FREE_SHARE * (shutil.disk_usage(folder).free + _taken(root()))))


class ShardCache:
    """The shards of one remote folder.

    Args:
        content: names what the folder holds; another one has other files.
        limit: bytes of all shards of this node, whatever their folder.
    """

    def __init__(self, storage: ObjectStorage, content: str, limit: int) -> None:
        self.storage, self.limit = storage, limit
        name = hashlib.sha256(f"{storage.url}\n{content}".encode()).hexdigest()[:16]
        self.folder = root() / name

    def path(self, name: str) -> Path:
        """Where a shard lies, or will."""
        return self.folder / check_name(name)

    def fetch(self, name: str, wanted: Wanted, wait: bool) -> Fetched:
        """Have a shard on the disk.

        Args:
            wanted: files that must not be deleted for it.
            wait: until another process that fetches it has done so.

        Raises:
            LoadError: it cannot be read, or the process that was waited for could not read it.
        """
        began = time.time()
        path, size = self.path(name), self.storage.pinned_size(name)
        partial = path.with_name(path.name + PARTIAL)
        while not _is_whole(path, size):
            with must_write(partial, _WAY_OUT):
                partial.parent.mkdir(parents=True, exist_ok=True)
                file = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if _lock(file, wait) is False:
                    return Fetched.ELSEWHERE
                if not _is_same(file, partial):
                    continue  # whoever had the lock has fetched it, or given up
                if _is_whole(path, size):  # it got its name before this file was made
                    partial.unlink()
                    break
                raise_if_given_up(self.storage.place(), [name], began)
                has_room = self._reserve(file, partial, size, wanted)
                if has_room is None:
                    continue
                if has_room:
                    try:
                        self.storage.download(name, partial)
                        with must_write(path, _WAY_OUT), suppress(FileNotFoundError):
                            partial.rename(path)
                        continue  # where files cannot be locked, another process may have renamed or deleted it
                    except NoRoomError:
                        pass
                partial.unlink(missing_ok=True)
                warn_once_a_minute(str(root()), f"{root()}: no room for {name}; its samples are read by ranges")
                return Fetched.NO_ROOM
            finally:
                os.close(file)
        return Fetched.HERE

    def _reserve(self, file: int, partial: Path, size: int, wanted: Wanted) -> bool | None:
        """Give the file its size, when it fits, perhaps after others were deleted. None: it was itself deleted."""
        with locked(root() / ".lock", _WAY_OUT):
            if not _is_same(file, partial):
                return None
            mine = os.fspath(partial)
            others = [(place, stat) for place, stat in _files(root()) if place != mine]
            room = self.limit - size - sum(stat.st_size for _, stat in others)
            for place, stat in sorted(others, key=lambda each: each[1].st_mtime) if room < 0 else ():
                if room >= 0:
                    break
                path = Path(place)
                if not wanted(path) and (path.suffix != PARTIAL or _is_left(path)):
                    path.unlink(missing_ok=True)
                    room += stat.st_size
            if room >= 0:
                with must_write(partial, _WAY_OUT):
                    os.truncate(file, size)
        return room >= 0


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Each file below a folder. Every fetch looks at all of them: 3 us each, with pathlib 11."""
    folders = [os.fspath(folder)]
    while folders:
        with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders.append(entry.path)
                elif entry.name != ".lock":
                    with suppress(FileNotFoundError):
                        yield entry.path, entry.stat()


def _is_whole(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except FileNotFoundError:
        return False


def _taken(folder: Path) -> int:
    return sum(stat.st_size for _, stat in _files(folder))


def _lock(file: int, wait: bool) -> bool | None:
    """Lock an open file. False: another process has; None: files cannot be locked here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None  # two processes may write the same bytes to the same places
    return True


def _is_same(file: int, path: Path) -> bool:
    """Whether an open file still has this path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _is_left(partial: Path) -> bool:
    """Whether nobody fetches it any more."""
    try:
        file = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return _lock(file, wait=False) is True
    finally:
        os.close(file)
