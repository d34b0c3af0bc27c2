"""Sidecar indexes of a folder of shards: what is where.

`<shard>.index.jsonl` belongs to `<shard>.tar`: a header line, then one line per sample. Own and foreign shards are
indexed alike, by one pass over the tar. manifest.py lists the shards, sidecars.py says where these files lie.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from json.encoder import encode_basestring_ascii as _quoted
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.errors import DataError, LoadError
from data_pipeline.files import must_write, write_atomic
from data_pipeline.masking import mask
from data_pipeline.parallel import pool
from data_pipeline.progress import Progress, silent
from data_pipeline.shards.manifest import Manifest, ShardInfo, ShardTable, load_manifest
from data_pipeline.shards.sidecars import index_name, index_storage, is_indexed, publish, writable_place
from data_pipeline.shards.storage import Storage, open_storage
from data_pipeline.shards.tarscan import ScannedSample, scan_tar
from data_pipeline.stores.failures import MissingObjectError
from data_pipeline.stores.folders import ETAGS, MANIFEST
from data_pipeline.stores.node_cache import MADE, OF_ETAG, CachedFolder, adopt
from data_pipeline.stores.object_storage import ObjectStorage
from data_pipeline.stores.remote import ObjectInfo

INDEX_VERSION = 3
"""Version of index files; version 2 did not take members such as `0_name.jpg` for images."""
log = logging.getLogger(__name__)


def index_lines(storage: Storage, place: Storage, shard: ShardInfo) -> list[bytes]:
    """The lines of a shard's index, one per sample; `place` is the shards' `index_storage`.

    An index that is missing or is not the manifest's is made anew from the shard, with a warning. Raises LoadError when
    the shard too is another than the manifest's.
    """
    name = index_name(shard.name)
    data = place.read(name) if place.exists(name) else b""
    if index_digest(data) == shard.sha256:
        return _lines(data, shard, place)
    log.warning("%s/%s is damaged or missing and is made anew", mask(place.url), name)
    try:
        data = scan_shard(storage, shard.name)
    except DataError as error:
        raise LoadError(str(error)) from error
    if index_digest(data) != shard.sha256:
        raise LoadError(
            f"{mask(storage.url)}/{shard.name} is not the shard that {mask(place.url)}/{MANIFEST} lists; "
            f"run `alignvlm data index {mask(storage.url)}`"
        )
    try:
        place.write(name, data)
    except DataError as error:
        log.warning("%s", error)
    return _lines(data, shard, place)


def no_shards(storage: Storage) -> DataError:
    """The error of a folder without shards, or that is not there."""
    own = storage.local_path(MANIFEST)
    is_there = own is None or own.parent.is_dir()
    return DataError(f"{mask(storage.url)}: {'no .tar shards here' if is_there else 'no such folder'}")


def _lines(data: bytes, shard: ShardInfo, place: Storage) -> list[bytes]:
    """The lines of an index file behind its header. Raises LoadError when they are not as many as the manifest says."""
    lines = data.splitlines()[1:]
    if len(lines) != shard.samples:
        raise LoadError(
            f"{mask(place.url)}/{MANIFEST}: {shard.name} has {len(lines)} samples, not {shard.samples}; index again"
        )
    return lines


def index_shards(
    folder: str | os.PathLike[str],
    *,
    source: str = "",
    origin: dict[str, Any] | None = None,
    num_processes: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Index every `*.tar` under a folder or URL and write its manifest. Raises DataError for damaged shards.

    Works on shards of any WebDataset writer, img2dataset's among them. Indexes that fit their shard by size and time,
    in an object store by its ETag, are kept. What cannot be written beside the shards goes to a cache folder, and a
    line says so.
    """
    storage = open_storage(folder)
    own = storage.local_path(MANIFEST)
    found: list[Any] = look(storage) if isinstance(storage, ObjectStorage) else list(storage.list(".tar"))
    index: Any = index_object if isinstance(storage, ObjectStorage) else _index_local
    if not found:
        raise no_shards(storage)
    name, place, count = source or PurePosixPath(storage.url).name, writable_place(storage), len(found)
    shards, etags = ShardTable(), dict[str, str]()
    if isinstance(storage, ObjectStorage):
        fetch_indexes(storage, place, found)
    with pool(num_processes, count) as executor, progress(f"index {name}", count) as advance:
        chunk = max(1, min(16, count // 64))
        run: Any = map if executor is None else partial(executor.map, chunksize=chunk)
        for shard, etag in run(index, [storage] * count, [place] * count, found):
            shards.add(shard.name, shard.samples, shard.size, shard.sha256)
            etags |= {shard.name: etag} if etag else {}
            advance(1)
    manifest = Manifest(name, shards, origin or {}, etags)
    if origin is None and is_indexed(storage):
        manifest = _unchanged(storage, manifest)
    save_manifest(storage, place, manifest, [index_name(shard) for shard in manifest.sizes])
    if own not in (None, place / MANIFEST) and load_manifest(storage).fingerprint != manifest.fingerprint:
        raise DataError(f"{own} does not fit the shards and cannot be written; make its folder writable")
    return manifest


def save_manifest(storage: Storage, place: Path, manifest: Manifest, indexes: Iterable[str] = ()) -> None:
    """Write the manifest last: beside local shards; into a bucket, where that is allowed, and the node's cache.

    `indexes` are those that the node's cache holds already (`adopt`): others are fetched when they are needed.
    """
    if not isinstance(storage, ObjectStorage):
        with must_write(place / MANIFEST, "make room or the folder writable"):
            manifest.save(place)
        return
    publish(storage, adopt(storage, manifest.to_bytes(), manifest.etags_bytes(storage.url), indexes), ETAGS, MANIFEST)


def _unchanged(storage: Storage, manifest: Manifest) -> Manifest:
    """The manifest that there is, when it lists the same: it knows how the shards came to be."""
    try:
        old = load_manifest(storage)
    except DataError:
        return manifest
    return replace(old, etags=manifest.etags) if old.fingerprint == manifest.fingerprint else manifest


def _index_local(storage: Storage, place: Path, name: str) -> tuple[ShardInfo, str]:
    """Write the index of one shard; one that is whole, newer than its shard and of the same size is taken as it is."""
    found = fitting_index(storage, name, place)
    return found or _write_index(storage, name, storage.size(name), place / index_name(name)), ""


def fitting_index(storage: Storage, name: str, place: Path) -> ShardInfo | None:
    """A local shard's row, from its index in `place`; None unless that is whole, and not older than the shard."""
    path, target = storage.local_path(name), place / index_name(name)
    assert path is not None
    size = storage.size(name)
    if not target.is_file() or target.stat().st_mtime_ns < path.stat().st_mtime_ns:
        return None
    data = target.read_bytes()
    header, digest = _header(data), index_digest(data)
    fits = header.get("version") == INDEX_VERSION and header["size"] == size and header.get("digest") == digest
    return ShardInfo(name, header["samples"], size, digest) if fits else None


@dataclass(frozen=True)
class Seen:
    """What is known of a shard in an object store before it is asked for."""

    name: str
    shard: ObjectInfo
    """The shard as the store lists it."""
    index: ObjectInfo | None
    """The index beside it, as that is listed."""
    row: ShardInfo | None = None
    etag: str = ""
    """Its row and its ETag in the manifest that there is."""

    @property
    def has_newer_index(self) -> bool:
        """Whether an index was written beside it after it."""
        return self.index is not None and self.index.modified > self.shard.modified > 0


def look(storage: ObjectStorage) -> list[Seen]:
    """The shards of a folder in an object store, by one listing and the manifest that there is."""
    listed, old = storage.listing(), Manifest("", ShardTable())
    with suppress(DataError):
        old = load_manifest(storage)
    rows, etags = {shard.name: shard for shard in old.shards}, old.etags
    names = [name for name in listed if name.endswith(".tar")]
    return [
        Seen(name, listed[name], listed.get(index_name(name)), rows.get(name), etags.get(name, "")) for name in names
    ]


def fetch_indexes(storage: ObjectStorage, place: Path, shards: Sequence[Seen]) -> None:
    """Have the indexes of shards on this node, many fetched at a time, as far as there are any.

    Those of the manifest, where the shard is listed with the ETag that it has there; those that came to no manifest
    yet, where they are newer than the shard.
    """
    known = [index_name(seen.name) for seen in shards if seen.index is not None and seen.shard.matches(seen.etag)]
    if known:
        CachedFolder(storage).fetch(known)
    new = [seen for seen in shards if seen.has_newer_index and not _known_etag(place, seen)]
    heads, indexes = storage.heads(seen.name for seen in new), storage.reads(index_name(seen.name) for seen in new)
    with suppress(MissingObjectError):
        for seen, info, data in zip(new, heads, indexes, strict=True):
            if replace(seen, shard=info).has_newer_index and _fits(data, info):
                _keep(place / MADE, index_name(seen.name), data, info)


def index_object(
    storage: ObjectStorage, place: Path, seen: Seen, scan: Callable[[Storage, str], bytes] | None = None
) -> tuple[ShardInfo, str]:
    """The same in an object store: row and ETag of a shard. `scan` reads it in the place of `scan_shard`."""
    name, index, info = seen.name, index_name(seen.name), _now(storage, place, seen)
    row = _kept(storage, place, seen, info)
    if row is None:
        data = (scan or scan_shard)(storage, name)
        _keep(place / MADE, index, data, info)
        publish(storage, place / MADE, index)
        row = _row(name, data, info)
    return row, info.etag


def is_done(storage: ObjectStorage, place: Path, seen: Seen) -> bool:
    """Whether a shard in an object store has an index that fits what it is now."""
    return _kept(storage, place, seen, _now(storage, place, seen)) is not None


def _now(storage: ObjectStorage, place: Path, seen: Seen) -> ObjectInfo:
    """What a shard is now: the store is asked where its listing does not show the ETag that the shard is known by."""
    etag = _known_etag(place, seen)
    return replace(seen.shard, etag=etag) if etag else storage.head(seen.name)


def _known_etag(place: Path, seen: Seen) -> str:
    """The ETag with which a shard was indexed, where it is listed with it; else empty."""
    etags = seen.etag, _etag_made(place, seen.name)
    return next((etag for etag in etags if seen.shard.matches(etag)), "")


def _etag_made(place: Path, name: str) -> str:
    """The ETag that a shard had when its index was made here and came to no manifest yet; empty where it was not."""
    index = place / MADE / index_name(name)
    try:
        return index.with_name(index.name + OF_ETAG).read_text(encoding="utf-8") if index.is_file() else ""
    except FileNotFoundError:
        return ""


def _kept(storage: ObjectStorage, place: Path, seen: Seen, info: ObjectInfo) -> ShardInfo | None:
    """The row of a shard in an object store whose index fits what it is now; None where it has none.

    The manifest's index fits while the shard has the ETag; so does one that did not come to a manifest.
    """
    name, index, made, row = seen.name, index_name(seen.name), place / MADE, seen.row
    if row is not None and info.etag and (row.size, seen.etag) == (info.size, info.etag):
        place_of_indexes = index_storage(storage)
        data = place_of_indexes.read(index) if place_of_indexes.exists(index) else b""
        if _header(data).get("version") == INDEX_VERSION and index_digest(data) == row.sha256:
            return row
    is_known = bool(info.etag) or seen.has_newer_index  # of a store without ETags
    if is_known and (made / index).is_file() and _etag_made(place, name) == info.etag:
        data = (made / index).read_bytes()
        if _fits(data, info):
            return _row(name, data, info)
    return None


def _fits(data: bytes, info: ObjectInfo) -> bool:
    """Whether an index is whole, of this version, and that of a shard of this size."""
    header = _header(data)
    return header.get("version") == INDEX_VERSION and (header["size"], header["digest"]) == (
        info.size,
        index_digest(data),
    )


def _keep(made: Path, index: str, data: bytes, info: ObjectInfo) -> None:
    """Put an index where `adopt` finds it, with the ETag of its shard."""
    with must_write(made / index, "make room or the folder writable"):
        (made / index).parent.mkdir(parents=True, exist_ok=True)
        (made / (index + OF_ETAG)).unlink(missing_ok=True)
        write_atomic(made / index, data)
        write_atomic(made / (index + OF_ETAG), info.etag)


def _row(name: str, data: bytes, info: ObjectInfo) -> ShardInfo:
    return ShardInfo(name, data.count(b"\n") - 1, info.size, index_digest(data))


def _write_index(storage: Storage, name: str, size: int, target: Path) -> ShardInfo:
    data = scan_shard(storage, name)
    with must_write(target, "make room or the folder writable"):
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(target, data)
    return ShardInfo(name, data.count(b"\n") - 1, size, index_digest(data))


def scan_shard(storage: Storage, name: str) -> bytes:
    """The index of a shard, from the shard itself. Raises DataError for damaged shards."""
    size, label = storage.size(name), storage.local_path(name) or f"{mask(storage.url)}/{name}"
    with storage.open(name) as file:
        return index_bytes(list(scan_tar(file, size, str(label))), name.rsplit("/", 1)[-1], size)


def index_bytes(samples: list[ScannedSample], shard: str, size: int) -> bytes:
    """An index file: a header line, then one line per sample.

    {"key", "members": {extension: [offset, size, crc32]}, "sizes": [[width, height], …]}; the size of an image without
    a readable header is null. The header's `sha256` is that of the content, its `digest` covers header and lines.
    """
    content = hashlib.sha256(b"".join([sample.digest for sample in samples])).hexdigest()
    header = {"shard": shard, "size": size, "samples": len(samples), "sha256": content}
    lines = "".join(map(_line, samples)).encode()
    head = {"version": INDEX_VERSION, **header, "digest": _digest(header, lines)}
    return json.dumps(head).encode() + b"\n" + lines


def _line(sample: ScannedSample) -> str:
    """A sample's line of the index, as `json.dumps` writes it but in a third of the time."""
    members = ",".join([f"{_quoted(name)}:[{m[0]},{m[1]},{m[2]}]" for name, m in sample.members.items()])
    sizes = ",".join(["null" if size is None else f"[{size[0]},{size[1]}]" for size in sample.image_sizes])
    return f'{{"key":{_quoted(sample.key)},"members":{{{members}}},"sizes":[{sizes}]}}\n'


def index_digest(data: bytes) -> str:
    """sha256 (hex) of an index file of any version, as the manifest has it; empty for damaged headers."""
    header = _header(data)
    return _digest(header, data.partition(b"\n")[2]) if header else ""


def _digest(header: Mapping[str, Any], lines: bytes) -> str:
    """Digest of the file that version 1 wrote, so that fingerprints stay and runs that began with it resume."""
    first = {"version": 1, **{name: header[name] for name in ("shard", "size", "samples", "sha256")}}
    return hashlib.sha256(json.dumps(first).encode() + b"\n" + lines).hexdigest()


def _header(data: bytes) -> dict[str, Any]:
    """The header of an index file; empty when it is damaged."""
    try:
        header = json.loads(data.partition(b"\n")[0])
    except (ValueError, RecursionError):
        return {}
    needed = {"version", "shard", "size", "samples", "sha256"}
    return header if isinstance(header, dict) and needed <= header.keys() else {}
