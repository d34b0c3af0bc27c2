"""Manifest, indexes and sample lengths of a remote folder as local files: fetched once per node, whoever asks first.

    <cache>/folders/<hash of the URL>/current.json      which manifest the folder has, by its ETag
    <cache>/folders/<hash of the URL>/<manifest>/…      the manifest and its indexes, named by the manifest's content
    <cache>/folders/<hash of the URL>/measures-<…>.npy  sample lengths, named by what they belong to

A file is written under a lock and as a whole; files of one name have one content, except current.json.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.files import check_name, has_shape, locked, must_write, read_json, write_atomic
from data_pipeline.masking import mask
from data_pipeline.stores.failures import MissingObjectError, NotModifiedError
from data_pipeline.stores.folders import ETAGS, MANIFEST, node_folder
from data_pipeline.stores.helper import ask
from data_pipeline.stores.object_storage import ObjectStorage
from data_pipeline.stores.requests import Get
from data_pipeline.stores.waiting.node_notes import raise_if_given_up

MADE = "made"
"""Folder with indexes that were made here and whose manifest is not written yet."""
OF_ETAG = ".etag"
"""Suffix of a file beside such an index, which holds the ETag of its shard."""
FRESH_SECONDS = 60.0
"""A manifest that a process of this node looked for within this time is not looked for again: ranks start together."""
_CURRENT = {"key": str, "etags": {str: str}, "checked": float, "seen?": str, "place?": str}
"""`seen` is the key of the manifest that the remote folder had; one with another key was made here. `place` is the URL
that was asked, without its password, on the Hub with a commit: manifest and shards must be of one."""
_WAY_OUT = "make room, or let ALIGNVLM_CACHE name another folder"


class CachedFolder:
    """The manifest and the indexes of a remote folder, from this node's cache (fulfils `shards.storage.Storage`).

    Only small files, which are read whole; their content never changes while the manifest is the same.
    """

    def __init__(self, storage: ObjectStorage) -> None:
        self.url, self._storage = storage.url, storage
        self._root = node_folder(storage.url)
        self._key: str | None = None

    def exists(self, name: str) -> bool:
        return self._find(name) is not None

    def read(self, name: str) -> bytes:
        path = self._find(name)
        if path is None:
            raise MissingObjectError(f"{self._storage}/{name}: no such object")
        return path.read_bytes()

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name))

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        return self.read(name)[offset : offset + size]

    def size(self, name: str) -> int:
        return len(self.read(name))

    def list(self, suffix: str = "") -> Iterator[str]:
        return self._storage.list(suffix)

    def fetch(self, names: Iterable[str]) -> None:
        """Have the local copies of files, many of them fetched at a time."""
        place, names = self._place(), list(names)
        with _alone(self._storage, place, names), suppress(MissingObjectError):
            missing = [name for name in names if not (place / check_name(name)).is_file()]
            for name, data in zip(missing, self._storage.reads(missing), strict=True):
                self.write(name, data)

    def local_path(self, name: str) -> Path:
        """Where the file lies, or is to be written."""
        return self._place() / check_name(name)

    def write(self, name: str, data: bytes) -> None:
        path = self._place() / check_name(name)
        with must_write(path, _WAY_OUT):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)

    def _place(self) -> Path:
        key = self.key()
        if key is None:
            raise DataError(f"{self._storage} has no {MANIFEST}")
        return self._root / key

    def _find(self, name: str) -> Path | None:
        if self.key() is None:
            return None
        return fetched(self._storage, name, self._place() / check_name(name))

    def key(self) -> str | None:
        """Which manifest the folder has: 16 hex digits of its content; None where it has none."""
        if self._key is None:
            self._key = self._look()
        return self._key

    def _look(self) -> str | None:
        place = mask(self._storage.place())
        with _alone(self._storage, self._root, (ETAGS, MANIFEST)):
            known = _current(self._root)
            is_here = known["place"] == place
            if known["key"] and is_here and 0 <= time.time() - known["checked"] < FRESH_SECONDS:
                return str(known["key"])
            known["place"] = place
            etags = self._newer(ETAGS, known)
            manifest = self._newer(MANIFEST, known)
            if manifest is not None and _key(manifest) == known["seen"]:  # of a store without ETags
                manifest = None
            if manifest is None and known["key"] != known["seen"]:  # what was made here stays until there is a new one
                return _adopt(self._root, None, None, _current(self._root) | {"place": place})
            if MANIFEST not in known["etags"]:
                return None
            known["seen"] = known["seen"] if manifest is None else _key(manifest)
            return _adopt(self._root, manifest, etags, known)

    def _newer(self, name: str, known: dict[str, dict[str, str]]) -> bytes | None:
        """The file where it changed since it was looked for, and its ETag noted."""
        try:
            data, info = ask(Get(self._storage.place(), name, unless=known["etags"].get(name, "")))
        except NotModifiedError:
            return None
        except MissingObjectError:
            known["etags"].pop(name, None)
            return b"" if name == ETAGS else None
        known["etags"][name] = info.etag
        assert isinstance(data, bytes)
        return data


def adopt(storage: ObjectStorage, manifest: bytes, etags: bytes, indexes: Iterable[str]) -> Path:
    """Make a manifest that was made here the current one of a node's folder, with the indexes that lie in `MADE`.

    The others are those of the manifest before, whose shards still have their ETags: they are taken over. Returns the
    folder of all of them.
    """
    root = node_folder(storage.url)
    place = root / _key(manifest)
    with locked(root / ".lock", _WAY_OUT), must_write(place, _WAY_OUT):
        known = _current(root) | {"place": mask(storage.place())}
        for name in indexes:
            made, old, new = root / MADE / name, root / known["key"] / name, place / name
            if made.is_file():
                new.parent.mkdir(parents=True, exist_ok=True)
                made.replace(new)
                made.with_name(made.name + OF_ETAG).unlink(missing_ok=True)
            elif known["key"] and old.is_file() and not new.exists():
                new.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(new, old.read_bytes())
        _adopt(root, manifest, etags, known)
    return place


def _current(root: Path) -> dict[str, Any]:
    known = read_json(root / "current.json")
    if not has_shape(known, _CURRENT) or not (root / known["key"] / MANIFEST).is_file():
        return {"key": "", "etags": {}, "checked": 0.0, "seen": "", "place": ""}
    return {"seen": known["key"] if known["etags"] else "", "place": "", **known}


def _key(manifest: bytes) -> str:
    return hashlib.sha256(manifest).hexdigest()[:16]


def _adopt(root: Path, manifest: bytes | None, etags: bytes | None, known: dict[str, object]) -> str:
    """Write what is not None, and make it the current manifest; the caller holds the lock. Returns its key."""
    with must_write(root, _WAY_OUT):
        if manifest is not None:
            known["key"] = _key(manifest)
            (root / str(known["key"])).mkdir(parents=True, exist_ok=True)
            write_atomic(root / str(known["key"]) / MANIFEST, manifest)
        if etags is not None:
            write_atomic(root / str(known["key"]) / ETAGS, etags)
        write_atomic(root / "current.json", json.dumps(known | {"checked": time.time()}))
    return str(known["key"])


@contextmanager
def _alone(storage: ObjectStorage, folder: Path, names: Iterable[str]) -> Iterator[None]:
    """One process of the node at a time asks the store for these objects, which come into a folder.

    Raises UnreachableError when the one that was waited for gave up the store or one of them.
    """
    since = time.time()
    with locked(folder / ".lock", _WAY_OUT):
        raise_if_given_up(storage.place(), names, since)
        yield


def fetched(storage: ObjectStorage, name: str, path: Path) -> Path | None:
    """The local copy of a small file, fetched by the first process of the node that wants it; None: there is none."""
    if path.is_file():
        return path
    with _alone(storage, path.parent, [name]):
        if not path.is_file():
            try:
                data = storage.read(name)
            except MissingObjectError:
                return None
            with must_write(path, _WAY_OUT):
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(path, data)
    return path
