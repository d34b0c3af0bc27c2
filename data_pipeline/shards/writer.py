"""Writes samples as standard WebDataset shards with indexes and manifest; a folder appears whole or not at all.

Shards for an object store are written to the node's cache and uploaded, the manifest last.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from reprlib import repr as brief
from typing import Any, BinaryIO

from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.files import has_shape, locked, must_write
from data_pipeline.samples.images import decode_image, image_extension
from data_pipeline.samples.schema import MAX_JSON_BYTES, SampleError, check_key, normalise_messages
from data_pipeline.shards.index import index_shards, save_manifest
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.sidecars import index_name, writable_place
from data_pipeline.shards.storage import open_storage
from data_pipeline.stores.folders import ETAGS, MANIFEST
from data_pipeline.stores.object_storage import ObjectStorage
from data_pipeline.stores.remote import check_writable

_WAY_OUT = "choose a folder that can be written and has room"
_UPLOADING = "uploading"
"""Folder of a node's cache for shards on their way to an object store."""
PNG_LEVEL = 4
"""One of zlib's nine levels. The usual 6 takes twice the time and makes files of noisy pages no smaller."""


def write_shards(
    samples: Iterable[Mapping[str, Any]],
    folder: str | os.PathLike[str],
    *,
    samples_per_shard: int = 1000,
    shard_bytes: int = 1 << 30,
    source: str = "",
    origin: Mapping[str, Any] | None = None,
    num_processes: int | None = None,
) -> Manifest:
    """Write records as shards of at most `samples_per_shard` samples and about `shard_bytes` bytes.

    A record is {"key": str, "messages": [...], "images": [PIL images or bytes of image files], **meta}. PIL images
    become lossless PNG of the pixels that training sees; bytes stay as they are. Written beside the folder and renamed
    at the end, so a crash leaves nothing that looks whole. `folder` may be the URL of one in an object store.

    Raises:
        DataError: the folder is not empty, a record is not a valid sample, or there is none.
    """
    storage, options = open_storage(folder), (samples_per_shard, shard_bytes, dict(origin or {}), num_processes)
    if isinstance(storage, ObjectStorage):
        return _write_far(samples, storage, source or storage.url.rsplit("/", 1)[-1], *options)
    path = storage.local_path("x")
    if path is None:
        raise DataError(f"{folder}: shards are written to folders and object stores only")
    return _write_local(samples, path.parent.absolute(), source or path.parent.absolute().name, *options)


def _write_far(samples: Iterable[Mapping[str, Any]], storage: ObjectStorage, source: str, *options: Any) -> Manifest:
    """The same in an object store. An upload that was interrupted goes on when the samples are the same."""
    check_writable(storage.url)
    place = writable_place(storage)
    made = place / _UPLOADING
    with locked(place / f"{_UPLOADING}.lock", "make room, or let ALIGNVLM_CACHE name another folder"):
        names = set(storage.list())
        if MANIFEST in names or (names and ETAGS not in names):
            raise DataError(f"{storage} is not empty; choose another folder or delete it")
        seen = storage.read(ETAGS) if ETAGS in names else b"{}"
        if not names and not storage.write_over(ETAGS, seen, None):  # what cannot be written says so now
            raise _other(storage)
        try:
            shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
            try:
                manifest = _write_local(samples, made, source, *options)
            except BaseException:
                _unmark(storage, names)
                raise
            return _upload(made, storage, place, manifest, names, seen)
        finally:
            for folder in (made, made.with_name(f"{made.name}.partial")):
                shutil.rmtree(folder, ignore_errors=True)


def _unmark(storage: ObjectStorage, names: set[str]) -> None:
    """Delete the mark that writing has begun, where nothing else has come."""
    with suppress(DataError):  # who may write may not always delete; the next call takes what is left
        if names <= {ETAGS} and _mark(storage.read(ETAGS)) == {}:
            storage.delete(ETAGS)


def _mark(data: bytes) -> Any:
    """What `etags.json` says; None where it is not JSON, and so not ours."""
    try:
        return json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return None


def _other(storage: ObjectStorage) -> DataError:
    return DataError(f"{storage}: another process writes other shards here; choose another folder")


def _upload(
    made: Path, storage: ObjectStorage, place: Path, manifest: Manifest, names: set[str], seen: bytes
) -> Manifest:
    """Copy shards and indexes that are not there; `etags.json` says whose shards a folder without manifest has.

    Args:
        names: what was there before the shards were made.
        seen: the `etags.json` of then; a process that has replaced it since keeps the folder.
    """
    begun = _mark(seen)
    is_own = has_shape(begun, {"manifest": str}) and begun["manifest"] == manifest.fingerprint
    if names - {ETAGS} and not is_own:
        raise DataError(f"{storage} holds other shards, which were not finished; choose another folder or delete it")
    if begun and not is_own and set(storage.list()) - {ETAGS}:  # whoever had begun then is at work
        raise _other(storage)
    etags, mine = {}, json.dumps({"manifest": manifest.fingerprint}).encode()
    if not storage.write_over(ETAGS, mine, seen):
        raise _other(storage)
    chains = [(shard, index_name(shard)) for shard in manifest.sizes if index_name(shard) not in names]
    storage.upload(*([(name, made / name) for name in chain] for chain in chains))
    for shard, found in zip(manifest.shards, storage.heads(manifest.sizes), strict=True):
        if found.size != shard.size:
            raise _other(storage)
        etags[shard.name] = found.etag
    if storage.read(ETAGS) != mine:
        raise _other(storage)
    manifest = replace(manifest, etags={name: etag for name, etag in etags.items() if etag})
    save_manifest(storage, place, manifest)
    return manifest


def _write_local(
    samples: Iterable[Mapping[str, Any]],
    folder: Path,
    source: str,
    samples_per_shard: int,
    shard_bytes: int,
    origin: dict[str, Any],
    num_processes: int | None,
) -> Manifest:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty; choose another folder or delete it")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    with must_write(partial, _WAY_OUT):
        partial.mkdir(parents=True)
    try:
        _write_tars(samples, folder, partial, samples_per_shard, shard_bytes)
        manifest = index_shards(partial, source=source, origin=origin, num_processes=num_processes)
        if folder.exists():
            folder.rmdir()
        os.rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write_tars(
    samples: Iterable[Mapping[str, Any]], folder: Path, partial: Path, samples_per_shard: int, shard_bytes: int
) -> None:
    """The tars of `folder`, in `partial`."""
    files: list[BinaryIO] = []

    def opener(name: str) -> BinaryIO:  # webdataset's own opener would run `pipe:` names
        files.append(open(name, "wb"))  # noqa: SIM115 (webdataset writes to it, `close` ends it)
        return files[-1]

    def close(name: str) -> None:
        files[-1].close()

    pattern = f"{str(partial).replace('%', '%%')}/%06d.tar"
    seen: set[str] = set()
    writer = tar_writers().ShardWriter(
        pattern, samples_per_shard, shard_bytes, close, 0, 0, opener, mtime=0, format="PAX_FORMAT", compress=False
    )
    try:
        for number, record in enumerate(samples):
            try:
                sample = to_members(record)
            except SampleError as error:
                raise DataError(f"{folder}: record {number} ({brief(record.get('key'))}): {error}") from error
            if sample["__key__"] in seen:
                raise DataError(f"{folder}: record {number}: the key {sample['__key__']!r} comes twice")
            seen.add(sample["__key__"])
            with must_write(partial, _WAY_OUT):
                writer.write(sample)
    finally:
        with must_write(partial, _WAY_OUT):  # the end of a file waits in memory until now
            writer.close()
    if not seen:
        raise DataError(f"{folder}: no records to write")


def tar_writers() -> Any:
    """The package webdataset, which writes tars. Raises DataError where it is not installed."""
    try:
        import webdataset
    except ModuleNotFoundError as error:
        raise DataError("writing shards needs webdataset: pip install 'alignvlm[train]'") from error
    return webdataset


def to_members(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a WebDataset sample: {"__key__", "json", "0.png", …}. Raises SampleError when it is not valid."""
    for name in ("json", "__key__"):
        if name in record:
            raise SampleError(f"a field may not be called {name!r}, as shards call their own; rename it")
    if "key" not in record or "messages" not in record:
        raise SampleError("a record has 'key', 'messages', 'images' and further fields as meta data")
    images = list(record.get("images", ()))
    normalise_messages(record["messages"], len(images))
    sample: dict[str, Any] = {
        "__key__": check_key(record["key"]),
        "json": _json({name: value for name, value in record.items() if name not in ("key", "images")}),
    }
    for number, image in enumerate(images):
        if isinstance(image, Image.Image):
            sample[f"{number}.png"] = _png(image)
        elif isinstance(image, bytes):
            sample[f"{number}.{image_extension(image)}"] = image
        else:
            raise SampleError(f"image {number} is {type(image).__name__}, neither a PIL image nor bytes")
    return sample


def _json(content: dict[str, Any]) -> bytes:
    try:
        data = json.dumps(content).encode()
    except RecursionError as error:
        raise SampleError("its values are nested too deeply") from error
    if len(data) > MAX_JSON_BYTES:
        raise SampleError(f"its texts and meta data have {len(data):,} bytes; at most {MAX_JSON_BYTES:,} are read")
    return data


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    decode_image(image).save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()
