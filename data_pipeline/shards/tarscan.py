"""Reads a WebDataset tar once, front to end, and notes where every sample's members lie. Nothing is extracted.

A sample is a run of files that share a key: the path up to the first dot of its last part (WebDataset's rule).
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.samples.images import image_members, image_size
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.storage import check_name

_MEMBER = re.compile(r"((?:.*/|)[^./][^./]*)[.]([^/]*)\Z")
_META_PREFIX = "__"


@dataclass
class ScannedSample:
    """One sample of a shard that was read."""

    key: str
    members: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Extension -> (offset of the data, size, crc32)."""
    image_sizes: list[tuple[int, int] | None] = field(default_factory=list)
    """(width, height) of its images, in order; None without a readable header."""
    digest: bytes = b""
    """sha256 of the members' names, sizes and bytes."""


def scan_tar(file: BinaryIO, size: int, name: str) -> Iterator[ScannedSample]:
    """The samples of a tar stream of `size` bytes. Raises DataError for damaged, truncated or unsafe archives."""
    current: ScannedSample | None = None
    images: dict[str, bytes] = {}
    digest = hashlib.sha256()
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                if not info.isreg() or info.name.rsplit("/", 1)[-1].startswith(_META_PREFIX):
                    continue
                check_name(info.name)
                match = _MEMBER.match(info.name.removeprefix("./"))
                if match is None:
                    continue
                key, extension = match[1], match[2].lower()
                if info.sparse is not None or info.offset_data + info.size > size:
                    raise DataError(f"{name}: member {info.name!r} is sparse or cut off; write the shard again")
                if current is None or key != current.key:
                    if current is not None:
                        yield _finish(current, images, digest)
                    if key in seen:
                        raise DataError(f"{name}: the key {key!r} comes twice; members of a sample must be neighbours")
                    seen.add(key)
                    current, images, digest = ScannedSample(key), {}, hashlib.sha256()
                if extension in current.members:
                    raise DataError(f"{name}: the member {info.name!r} comes twice")
                stream = tar.extractfile(info)
                assert stream is not None
                data = stream.read()
                current.members[extension] = (info.offset_data, info.size, zlib.crc32(data))
                digest.update(f"{key}.{extension}:{len(data)}:".encode())
                digest.update(data)
                if image_members([extension]):
                    images[extension] = data
    except (tarfile.TarError, EOFError) as error:
        raise DataError(f"{name}: not a whole tar archive ({error}); write or download the shard again") from error
    if current is not None:
        yield _finish(current, images, digest)


def _finish(sample: ScannedSample, images: dict[str, bytes], digest: hashlib._Hash) -> ScannedSample:
    sample.digest = digest.digest()
    sample.image_sizes = [_header_size(images[extension]) for extension in image_members(sample.members)]
    return sample


def _header_size(data: bytes) -> tuple[int, int] | None:
    """(width, height); None for bytes that no decoder takes, whose sample is left out when it is measured."""
    try:
        return image_size(data)
    except SampleError:
        return None
