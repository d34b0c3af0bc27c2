"""Reads a WebDataset tar once, front to end, and notes where every sample's members lie. Nothing is extracted.

A sample is a run of files that share a key: the path up to the first dot of its last part (WebDataset's rule).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from data_pipeline.checksums import crc32
from data_pipeline.errors import DataError
from data_pipeline.samples.images import image_members, image_size, is_image
from data_pipeline.samples.jpeg_header import plain_jpeg_size
from data_pipeline.samples.schema import MAX_JSON_BYTES, SampleError, is_meta
from data_pipeline.shards.storage import check_name
from data_pipeline.shards.tarheaders import Member, TarDamage, Window, read_members

log = logging.getLogger(__name__)


@dataclass(slots=True)
class ScannedSample:
    """One sample of a shard that was read."""

    key: str
    members: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Extension -> (offset of the data, size, crc32)."""
    image_sizes: list[tuple[int, int] | None] = field(default_factory=list)
    """(width, height) of its images, in order; None without a readable header."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Extension -> bytes of the members that were asked for."""
    digest: bytes = b""
    """sha256 of the members' names, sizes and bytes."""


def scan_tar(file: BinaryIO, size: int, name: str, texts: Collection[str] = ()) -> Iterator[ScannedSample]:
    """The samples of a tar file of `size` bytes. Links are left out, with one warning; joined archives get one too.

    Args:
        texts: extensions of members whose bytes are kept, where they are small enough to be read.

    Raises:
        DataError: the archive is damaged, cut off or unsafe; the message names the place and the samples before it.
    """
    seen = _Seen()
    try:
        yield from _samples(Window(file, size), texts, seen)
    except TarDamage as damage:
        last = f", the last one {next(reversed(seen.keys))!r}" if seen.keys else ""
        way_out = "write or download the shard again"
        if damage.offset == size and seen.keys and "://" not in name:  # whole blocks, and nothing of a header
            way_out += f", or, if no sample is missing, end it by `head -c 1024 /dev/zero >> {name}`"
        raise DataError(
            f"{name}: {damage} (byte {damage.offset:,}, after {len(seen.keys)} samples{last}); {way_out}"
        ) from damage
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error
    if seen.num_links:
        advice = "tar -h --hard-dereference archives files in their place"
        log.warning("%s: left out %d link(s); %s", name, seen.num_links, advice)
    if len(seen.archives) > 1:
        log.warning(
            "%s: read as %d archives that were joined; if it was written as one, it is damaged before byte %d",
            name, len(seen.archives), sorted(seen.archives)[1],
        )  # fmt: skip


@dataclass
class _Seen:
    """What was met in a tar file so far."""

    keys: dict[str, None] = field(default_factory=dict)
    """Keys of the samples, in order."""
    num_links: int = 0
    archives: set[int] = field(default_factory=lambda: {0})
    """Where the archives begin that were joined to make the file."""


def _samples(window: Window, texts: Collection[str], seen: _Seen) -> Iterator[ScannedSample]:
    """The samples of a tar file. Raises TarDamage and OSError."""
    current: ScannedSample | None = None
    sizes: dict[str, tuple[int, int] | None] = {}
    digest = hashlib.sha256()
    for member in read_members(window):
        name_inside = member.name.removeprefix("./")
        seen.num_links += member.is_link
        seen.archives.add(member.archive)
        if not member.is_file or is_meta(name_inside):
            continue
        _check_name(member)
        folder, slash, last = name_inside.rpartition("/")
        stem, dot, extension = last.partition(".")
        if not stem or not dot:
            continue
        key, extension = f"{folder}{slash}{stem}", extension.lower()
        if member.is_sparse:
            raise TarDamage(member.header, f"the member {member.name!r} is sparse")
        if current is None or key != current.key:
            if current is not None:
                yield _finish(current, sizes, digest)
            if key in seen.keys:
                raise TarDamage(member.header, f"the key {key!r} comes twice; a sample's members are neighbours")
            seen.keys[key] = None
            current, sizes, digest = ScannedSample(key), {}, hashlib.sha256()
        if extension in current.members:
            raise TarDamage(member.header, f"the member {member.name!r} comes twice")
        digest.update(f"{key}.{extension}:{member.size}:".encode())
        is_picture, is_text = is_image(extension), extension in texts and member.size <= MAX_JSON_BYTES
        crc, pixels, text = _read(window, member, digest, is_picture, is_text)
        current.members[extension] = (member.data, member.size, crc)
        if is_picture:
            sizes[extension] = pixels
        elif is_text:
            current.texts[extension] = text
    if current is not None:
        yield _finish(current, sizes, digest)


def _check_name(member: Member) -> None:
    try:
        check_name(member.name)
    except DataError as error:
        raise TarDamage(member.header, str(error)) from error


def _read(
    file: Window, member: Member, digest: hashlib._Hash, is_picture: bool, is_text: bool
) -> tuple[int, tuple[int, int] | None, bytes]:
    """(CRC-32, size of an image, bytes of a text) of a member, whose bytes `digest` takes in.

    Nothing is kept of a plain JPEG whose header is in the first piece.
    """
    crc = position = 0
    size: tuple[int, int] | None = None
    kept = []
    for piece in file.pieces(member.data, member.size):
        crc = crc32(piece, crc)
        digest.update(piece)
        if is_picture and position == 0:
            size = plain_jpeg_size(piece)
        if is_text or (is_picture and size is None):
            kept.append(bytes(piece))
        position += len(piece)
    if position < member.size:
        raise TarDamage(member.header, f"the member {member.name!r} is cut off")
    data = b"".join(kept)
    if is_picture and size is None:
        size = _header_size(data)
    return crc, size, data


def _finish(sample: ScannedSample, sizes: dict[str, tuple[int, int] | None], digest: hashlib._Hash) -> ScannedSample:
    sample.digest = digest.digest()
    sample.image_sizes = [sizes[extension] for extension in image_members(sizes)]
    return sample


def _header_size(data: bytes) -> tuple[int, int] | None:
    """(width, height); None for bytes that no decoder takes, whose sample is left out when it is measured."""
    try:
        return image_size(data)
    except SampleError:
        return None
