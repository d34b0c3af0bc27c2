"""Writes samples as standard WebDataset shards with indexes and manifest; a folder appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from reprlib import repr as brief
from typing import Any, BinaryIO

from PIL import Image

from data_pipeline.errors import DataError
from data_pipeline.files import must_write
from data_pipeline.samples.images import decode_image, image_extension
from data_pipeline.samples.schema import SampleError, check_key, normalise_messages
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest

_WAY_OUT = "choose a folder that can be written and has room"


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
    at the end, so a crash leaves nothing that looks whole.

    Raises:
        DataError: the folder is not empty, a record is not a valid sample, or there is none.
    """
    from webdataset import ShardWriter

    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty; choose another folder or delete it")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with must_write(partial, _WAY_OUT):
        partial.mkdir(parents=True)
    files: list[BinaryIO] = []

    def opener(name: str) -> BinaryIO:  # webdataset's own opener would run `pipe:` names
        files.append(open(name, "wb"))  # noqa: SIM115 (webdataset writes to it, `close` ends it)
        return files[-1]

    def close(name: str) -> None:
        files[-1].close()

    pattern = f"{str(partial).replace('%', '%%')}/%06d.tar"
    seen: set[str] = set()
    with ShardWriter(
        pattern, samples_per_shard, shard_bytes, close, 0, 0, opener, mtime=0, format="PAX_FORMAT", compress=False
    ) as writer:
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
    if not seen:
        shutil.rmtree(partial)
        raise DataError(f"{folder}: no records to write")
    manifest = index_shards(
        partial, source=source or folder.name, origin=dict(origin or {}), num_processes=num_processes
    )
    if folder.exists():
        folder.rmdir()
    os.rename(partial, folder)
    return manifest


def to_members(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record as a WebDataset sample: {"__key__", "json", "0.png", …}. Raises SampleError when it is not valid."""
    unknown = {"json", "__key__"} & set(record)
    if unknown or "key" not in record or "messages" not in record:
        raise SampleError("a record has 'key', 'messages', 'images' and further fields as meta data")
    images = list(record.get("images", ()))
    normalise_messages(record["messages"], len(images))
    sample: dict[str, Any] = {
        "__key__": check_key(record["key"]),
        "json": {name: value for name, value in record.items() if name not in ("key", "images")},
    }
    for number, image in enumerate(images):
        if isinstance(image, Image.Image):
            sample[f"{number}.png"] = _png(image)
        elif isinstance(image, bytes):
            sample[f"{number}.{image_extension(image)}"] = image
        else:
            raise SampleError(f"image {number} is {type(image).__name__}, neither a PIL image nor bytes")
    return sample


def _png(image: Image.Image) -> bytes:
    buffer = BytesIO()
    decode_image(image).save(buffer, "PNG")
    return buffer.getvalue()
