"""A published dataset as a whole: which files, which layout, and its rows as records for the writer, or why not."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from data_pipeline.errors import DataError, nearest
from data_pipeline.importers import IMPORTERS
from data_pipeline.importers.layouts import LAYOUTS, find_layout
from data_pipeline.importers.layouts.layout import Layout, Row
from data_pipeline.importers.rows.far_path import AnyPath, relative
from data_pipeline.importers.rows.files import READERS, find_files
from data_pipeline.importers.rows.images import ImageFiles, row_image
from data_pipeline.samples.schema import MAX_IMAGES, SampleError
from data_pipeline.samples.turns import check_answers, place_images

Record = dict[str, Any]
_UNFIT = re.compile(r"[^\w/-]+")
_MAX_PREFIX = 150
_MAX_ERROR = 300
_LOOKED_AT = 100
"""Rows of a file among which the first that can be read is looked for."""
_OWN = {"json": "source_json", "key": "source_key", "__key__": "source_key", "messages": "source_messages"}
"""Fields that a record has for itself -> what a column of that name is called in the meta data."""


@dataclass(frozen=True)
class Rejected:
    """A row that cannot be used, and why."""

    key: str
    error: str


@dataclass(frozen=True)
class Reading:
    """How a dataset's rows are read.

    `images` is the folder or zip archive of the files that rows name (None: the folder of the file with the row),
    `columns` are names of a layout -> names in the file, `defaults` are values of columns that a row may not have.
    """

    format: str
    images: AnyPath | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)

    def records(self, path: AnyPath, prefix: str, begin: int, end: int, offset: int = 0) -> Iterator[Record | Rejected]:
        """Rows `begin` to `end` of a file, whose first begins at byte `offset`, as `writer.to_members` takes them.

        The key of a sample is `prefix`, and the number of its row. Raises DataError for damaged files.
        """
        files, layout = ImageFiles(self.images or path.parent), LAYOUTS[self.format]
        for number, row in enumerate(READERS[path.suffix.lower()].read(path, begin, end, offset), begin):
            key = f"{prefix}-{number:09d}"
            try:
                if isinstance(row, SampleError):
                    raise row
                yield {"key": key, **_record(self._renamed(row), layout, files)}
            except SampleError as error:
                yield Rejected(key, _line(error))
            except RecursionError:
                yield Rejected(key, "its values are nested too deeply")

    def _renamed(self, row: Row) -> Row:
        for old in self.columns.values():
            if old not in row:
                raise SampleError(f"no column {old!r}")
        return {**self.defaults, **_rename(row, self.columns)}


@dataclass(frozen=True)
class Dataset:
    """A published dataset on disk or in an object store: its files, and how their rows are read."""

    path: AnyPath
    files: list[AnyPath]
    reading: Reading
    columns: tuple[str, ...] = ()
    """Columns of its first row."""

    def names(self) -> list[str]:
        """The files' paths in the dataset."""
        return [relative(file, self.path).as_posix() if file != self.path else file.name for file in self.files]

    def prefixes(self) -> list[str]:
        """What the keys of each file's samples begin with: its path in the dataset, without what keys cannot hold."""
        prefixes: dict[str, None] = {}
        for number, name in enumerate(self.names()):
            prefix = _UNFIT.sub("_", PurePosixPath(name).with_suffix("").as_posix()).strip("/")
            if len(prefix) > _MAX_PREFIX:
                prefix = f"{prefix[:100]}_{hashlib.sha256(name.encode()).hexdigest()[:16]}"
            prefixes[f"{prefix}_{number}" if prefix in prefixes else prefix] = None
        return list(prefixes)


def open_dataset(
    path: AnyPath,
    format: str = "auto",
    *,
    images: AnyPath | None = None,
    columns: Mapping[str, str] | None = None,
    split: str = "",
    prompt: str = "",
) -> Dataset:
    """A published dataset, its layout found from its first row where `format` is `auto`.

    Args:
        path: file or folder with its rows.
        images: folder or zip archive of the image files that rows name; default: the folder of the file with the row.
        columns: names of the layout -> names in the file, where these differ.
        split: which of its splits, where it has several.
        prompt: what the user says to an image that only has a caption.

    Raises:
        DataError: no rows, a layout that is not known, or columns that are not there.
    """
    if format not in ("auto", *LAYOUTS):
        raise DataError(f"unknown format {format!r}: {nearest(format, [*IMPORTERS, *LAYOUTS])}")
    files, columns = find_files(path, split), dict(columns or {})
    if images is not None and not images.exists():
        raise DataError(f"{images}: no such folder or archive of images")
    defaults = {"prompt": prompt} if prompt else {}
    row = _first_row(path, files)
    for name, old in columns.items():
        if old not in row:
            raise DataError(f"{path}: no column {old!r} to read as {name!r}: {nearest(old, row)}")
    row = _rename(row, columns)
    try:
        name = find_layout(row, format)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return Dataset(path, files, Reading(name, images, columns, defaults), tuple(row))


def _rename(row: Row, columns: Mapping[str, str]) -> Row:
    """A row whose columns have their layout's names; two columns may also swap their names."""
    taken = {name: row[old] for name, old in columns.items()}
    return {**{name: value for name, value in row.items() if name not in columns.values()}, **taken}


def _first_row(path: AnyPath, files: list[AnyPath]) -> Row:
    """The first row that can be read, among the first ones of each file."""
    wrong = ""
    for file in files:
        for row in READERS[file.suffix.lower()].read(file, 0, _LOOKED_AT, 0):
            if not isinstance(row, SampleError):
                return row
            wrong = wrong or f"{file}: its first row cannot be read: {_line(row)}"
    raise DataError(wrong or f"{path}: no rows")


def _line(error: SampleError) -> str:
    """An error on one line that may be printed, whatever the row held."""
    line = " ".join(str(error).split())
    return "".join(char if char.isprintable() else "?" for char in line[:_MAX_ERROR])


def _record(row: Row, layout: Layout, files: ImageFiles) -> Record:
    """Messages, images and meta data of a row. Raises SampleError when it cannot be used."""
    found = layout.images(row)
    if len(found) > MAX_IMAGES:
        raise SampleError(f"{len(found)} images; at most {MAX_IMAGES} are read")
    images = [row_image(each, files) for each in found]
    messages = place_images(layout.messages(row), len(images))
    check_answers(messages)
    meta = {_OWN.get(name, name): plain for name, value in row.items() if (plain := _plain(value)) is not None}
    return {"messages": messages, "images": images, **meta}


def _plain(value: Any) -> Any:
    """A value as JSON has it; None for bytes and for what is not a number."""
    if isinstance(value, bytes) or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
