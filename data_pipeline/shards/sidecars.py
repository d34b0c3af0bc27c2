"""Where manifest, indexes and sample lengths of a folder of shards lie: beside the shards, or in a cache folder.

A local folder that cannot be written has a cache folder, named after its path and its content, below XDG_CACHE_HOME or
else ~/.cache, and where that cannot be written either, below the folder for temporary files. Whoever reads looks in
the same places in the same order, so all processes find what one of them wrote; nodes must share the cache's place.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from data_pipeline.errors import DataError
from data_pipeline.shards.storage import LocalStorage, Storage

MANIFEST = "manifest.json"
log = logging.getLogger(__name__)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def index_name(shard: str) -> str:
    """Name of the index of a shard."""
    return f"{shard.removesuffix('.tar')}.index.jsonl"


def beside(storage: Storage, name: str) -> Iterator[Path]:
    """Files of this name that belong to a folder of shards: beside them, then in the cache."""
    return (place / name for place in _places(storage) if (place / name).is_file())


def find_beside(storage: Storage, name: str) -> Path | None:
    """The first of these files; None when there is none."""
    return next(beside(storage, name), None)


def index_storage(storage: Storage) -> Storage:
    """Where manifest and indexes of a folder are read: the storage itself, or the cache folder of a local one."""
    manifest = find_beside(storage, MANIFEST)
    own = storage.local_path(MANIFEST)
    return storage if manifest is None or manifest == own else LocalStorage(str(manifest.parent))


def is_indexed(storage: Storage) -> bool:
    """Whether a folder has a manifest, beside its shards or in the cache."""
    return index_storage(storage).exists(MANIFEST)


def searched(storage: Storage) -> str:
    """For errors about a file that is missing: " in FOLDER, CACHE, …" for a folder that cannot be written, else ""."""
    own = storage.local_path(MANIFEST)
    if own is None or not own.parent.is_dir() or os.access(own.parent, os.W_OK):
        return ""
    return f" in {', '.join(map(str, _places(storage)))} (all hosts of a job must share one of these)"


def writable_place(storage: Storage) -> Path:
    """Folder to write such files to: the shards' own, or their cache folder. Raises DataError when there is none."""
    own = storage.local_path(MANIFEST)
    if own is None:
        raise DataError(f"{storage.url}: sample lengths are kept for local folders only")
    for place in _places(storage):
        try:
            if place != own.parent:
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                if place != own.parent:
                    _say(own.parent, place)
                return place
        except OSError as error:
            if place == own.parent and error.errno not in _REFUSED:
                raise DataError(f"{place} cannot be written: {error.strerror}") from error
    raise DataError(
        f"{own.parent} cannot be written, and no cache folder either; let XDG_CACHE_HOME name a folder that can"
    )


@cache
def _say(folder: Path, place: Path) -> None:
    """Once in a process."""
    log.warning("%s cannot be written: its index and sample lengths are kept in %s", folder, place)


def _places(storage: Storage) -> Iterator[Path]:
    own = storage.local_path(MANIFEST)
    if own is None:
        return
    yield own.parent
    name = f"{own.parent.name}-{_content(storage, own)}"
    for folder in _caches():
        yield folder / name


def _content(storage: Storage, manifest: Path) -> str:
    """Changes with a folder's path, and with its manifest or else the names and sizes of its shards."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(manifest.parent)))
    if manifest.is_file():
        digest.update(manifest.read_bytes())
    else:
        for name in storage.list(".tar"):
            digest.update(f"\n{name}\n{storage.size(name)}".encode())
    return digest.hexdigest()[:16]


def _caches() -> Iterator[Path]:
    """Folders for caches, the first one that can be written is taken."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(home):  # the standard has other values ignored
        home = os.path.expanduser("~/.cache")
    if os.path.isabs(home):
        yield Path(home) / "alignvlm" / "shards"
    temporary = Path(tempfile.gettempdir()) / f"alignvlm-{os.getuid()}"
    if not os.path.lexists(temporary) or temporary.lstat().st_uid == os.getuid():  # no other user's folder is believed
        yield temporary / "shards"
