"""Where manifest, indexes and sample lengths of a folder of shards lie: beside the shards, or in a cache folder.

Those of a folder in an object store are read from copies in the node's cache (stores/node_cache.py). A local folder
that cannot be written has a cache folder, named after its path and its content, below ALIGNVLM_CACHE, XDG_CACHE_HOME or
~/.cache, and where none of them can be written, below the folder for temporary files. Whoever reads looks in the same
places in the same order, so all processes find what one of them wrote; nodes must share the cache's place.
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
from data_pipeline.masking import mask
from data_pipeline.shards.storage import LocalStorage, Storage
from data_pipeline.stores.failures import AccessError
from data_pipeline.stores.folders import MANIFEST, cache_folders, node_folder
from data_pipeline.stores.node_cache import CachedFolder, fetched
from data_pipeline.stores.object_storage import ObjectStorage

log = logging.getLogger(__name__)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def index_name(shard: str) -> str:
    """Name of the index of a shard."""
    return f"{shard.removesuffix('.tar')}.index.jsonl"


def beside(storage: Storage, name: str, *companions: str) -> Iterator[Path]:
    """Files of this name that belong to a folder of shards: beside them, then in the cache.

    `companions` may lie beside the file, and are fetched with it.
    """
    if isinstance(storage, ObjectStorage):
        place = node_folder(storage.url)
        if name == MANIFEST:
            cached = CachedFolder(storage)
            return iter((cached.local_path(name),) if cached.exists(name) else ())
        if not (place / name).is_file():
            for companion in companions:
                fetched(storage, companion, place / companion)
        found = fetched(storage, name, place / name)
        return iter(() if found is None else (found,))
    return (place / name for place in _places(storage) if (place / name).is_file())


def find_beside(storage: Storage, name: str) -> Path | None:
    """The first of these files; None when there is none."""
    return next(beside(storage, name), None)


def index_storage(storage: Storage) -> Storage:
    """Where manifest and indexes of a folder are read: the storage itself, or its cache folder."""
    if isinstance(storage, ObjectStorage):
        return CachedFolder(storage)
    manifest = find_beside(storage, MANIFEST)
    own = storage.local_path(MANIFEST)
    return storage if manifest is None or manifest == own else LocalStorage(str(manifest.parent))


def is_indexed(storage: Storage) -> bool:
    """Whether a folder has a manifest, beside its shards or in the cache."""
    return index_storage(storage).exists(MANIFEST)


def searched(storage: Storage) -> str:
    """Part of errors about a missing file: " in FOLDER, CACHE, …" where the folder cannot be written, else ""."""
    if isinstance(storage, ObjectStorage):
        return (
            f", nor in {node_folder(storage.url)} (where the bucket cannot be written, all hosts must share one cache)"
        )
    own = storage.local_path(MANIFEST)
    if own is None or not own.parent.is_dir() or os.access(own.parent, os.W_OK):
        return ""
    return f" in {', '.join(map(str, _places(storage)))} (all hosts of a job must share one of these)"


def writable_place(storage: Storage) -> Path:
    """Folder to write such files to: the shards' own, or their cache folder. Raises DataError when there is none."""
    own = storage.local_path(MANIFEST)
    if isinstance(storage, ObjectStorage):
        place = node_folder(storage.url)
        place.mkdir(parents=True, exist_ok=True)
        return place
    if own is None:
        raise DataError(f"{storage.url}: sample lengths are kept for local folders and object stores only")
    for place in _places(storage):
        try:
            if place != own.parent:
                place.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                if place != own.parent:
                    say_kept(str(own.parent), place)
                return place
        except OSError as error:
            if place == own.parent and error.errno not in _REFUSED:
                raise DataError(f"{place} cannot be written: {error.strerror}") from error
    raise DataError(
        f"{own.parent} cannot be written, and no cache folder either; let XDG_CACHE_HOME name a folder that can"
    )


def publish(storage: Storage, place: Path, *names: str) -> None:
    """Write files of `place`, in the node's cache, into the remote folder that they belong to, where that is allowed.

    Files beside local shards are published already.
    """
    if isinstance(storage, ObjectStorage):
        try:
            storage.upload([(name, place / name) for name in names])
        except AccessError:
            say_kept(storage.url, place)


@cache
def say_kept(url: str, place: Path) -> None:
    """Say, once in a process, where indexes of a bucket are kept that could not be written there."""
    log.warning("%s cannot be written: its index and sample lengths are kept in %s", mask(url), place)


def _places(storage: Storage) -> Iterator[Path]:
    own = storage.local_path(MANIFEST)
    if own is None:
        return
    yield own.parent
    name = f"{own.parent.name}-{_content(storage, own)}"
    for folder in cache_folders():
        yield folder / "shards" / name


def _content(storage: Storage, manifest: Path) -> str:
    """Changes with a folder's path, and with its manifest or else the names and sizes of its shards."""
    digest = hashlib.sha256(os.fsencode(os.path.realpath(manifest.parent)))
    if manifest.is_file():
        digest.update(manifest.read_bytes())
    else:
        for name in storage.list(".tar"):
            digest.update(f"\n{name}\n{storage.size(name)}".encode())
    return digest.hexdigest()[:16]
