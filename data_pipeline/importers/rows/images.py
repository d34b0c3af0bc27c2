"""The bytes of a row's images, never re-encoded: in the row itself, or in a folder or zip archive beside it."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from functools import lru_cache
from reprlib import repr as brief
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files import reason
from data_pipeline.importers.rows.far_path import AnyPath, FarPath
from data_pipeline.masking import mask
from data_pipeline.samples.images import MAX_IMAGE_BYTES, image_bytes
from data_pipeline.samples.schema import SampleError
from data_pipeline.shards.storage import check_name
from data_pipeline.stores.failures import MissingObjectError, TooLargeError

_ARCHIVE_BYTES = 256 * 1024
"""Bytes of an archive that are read at a time: mostly, a member's header and image are one request then."""


class ImageFiles:
    """Image files by name: of a folder, or of a zip archive, which is not unpacked."""

    def __init__(self, place: AnyPath) -> None:
        self.place = place

    def read(self, name: str) -> bytes:
        """The content of a file. Raises SampleError for names that leave the folder, and what cannot be read."""
        try:
            check_name(name)
        except DataError as error:
            raise SampleError(f"image {error}") from error
        try:
            if self.place.suffix.lower() != ".zip":
                place = self.place / name
                return _far_image(place) if isinstance(place, FarPath) else image_bytes(place)
            return self._read_member(name)
        except SampleError as error:
            raise SampleError(f"image {name[:200]!r} of {self.place.name or self.place}: {error}") from error

    def _read_member(self, name: str) -> bytes:
        archive = _open_archive(self.place, os.getpid())
        try:
            member = archive.getinfo(name)
            if member.file_size > MAX_IMAGE_BYTES:
                raise SampleError(f"{member.file_size:,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
            return archive.read(member)  # at most as many bytes as its header says
        except KeyError as error:
            raise SampleError("no such file in the archive") from error
        except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
            raise SampleError(f"cannot be unpacked ({reason(error)})") from error


def _far_image(path: FarPath) -> bytes:
    try:
        return path.read_bytes(MAX_IMAGE_BYTES)
    except MissingObjectError as error:
        raise SampleError("no such file") from error
    except TooLargeError as error:
        raise SampleError(f"image of {error}") from error


@lru_cache(maxsize=4)
def _open_archive(place: AnyPath, process: int) -> zipfile.ZipFile:
    """An archive, whose list of files takes seconds to read where it is long: once per process.

    Not in one that was forked later: the two would move the same position in the file.
    """
    try:
        return zipfile.ZipFile(place.open("rb", buffering=_ARCHIVE_BYTES))
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{place} cannot be read as a zip archive ({reason(error)})") from error


def row_image(value: Any, files: ImageFiles) -> bytes:
    """An image of a row: bytes, {"bytes", "path"} as `datasets` has it, or a file's name. Raises SampleError."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value
    if isinstance(value, bytes):
        if len(value) > MAX_IMAGE_BYTES:
            raise SampleError(f"image of {len(value):,} bytes; at most {MAX_IMAGE_BYTES:,} are read")
        return value
    if not isinstance(value, str):
        raise SampleError(f"image {brief(value)} is neither bytes nor a file name")
    if "://" in value[:16]:
        raise SampleError(f"image {brief(mask(value))} is a URL; fetch images with img2dataset and write its output")
    return files.read(value)
