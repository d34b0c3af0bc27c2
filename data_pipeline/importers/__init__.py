"""From data as people have it to shards: a registry of formats, each a function from a path to records.

Published layouts, which are cut and written by many processes, are registered in layouts/.

A new format is a function `read(path, **options)` that yields records as `writer.write_shards` takes them, and one
call of `register`, here or in a user's own program. Its keyword arguments are the options; those from a command line
are strings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import DataError, nearest
from data_pipeline.importers.jsonl import read_jsonl
from data_pipeline.importers.rows.far_path import AnyPath, FarPath

Read = Callable[..., Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class Importer:
    """A format: its reader, and the suffixes by which `auto` knows its files."""

    read: Read
    suffixes: tuple[str, ...]
    reads_urls: bool = False
    """Whether `read` takes a FarPath too (rows/far_path.py)."""


IMPORTERS: dict[str, Importer] = {}
"""Name of a format -> its importer; filled by `register`."""


def register(name: str, read: Read, suffixes: tuple[str, ...] = (), reads_urls: bool = False) -> None:
    """Add a format, or replace one. Suffixes are in lower case with their dot."""
    IMPORTERS[name] = Importer(read, suffixes, reads_urls)


def format_of(path: AnyPath, format: str = "auto") -> str | None:
    """The format itself where it is registered here; for `auto` the one with the path's suffix. None: no such one."""
    if format != "auto":
        return format if format in IMPORTERS else None
    return next((name for name, each in IMPORTERS.items() if path.suffix.lower() in each.suffixes), None)


def read_records(path: AnyPath, format: str = "auto", **options: Any) -> Iterator[dict[str, Any]]:
    """The records of a file or folder in one of the registered formats; `auto` goes by the path's suffix.

    Raises:
        DataError: an unknown format or option, or what the format's reader finds wrong.
    """
    name = format_of(path, format)
    if name is None and format == "auto":
        raise DataError(f"{path}: its suffix tells no format; name one with --format: {', '.join(IMPORTERS)}")
    if name is None:
        raise DataError(f"unknown format {format!r}: {nearest(format, IMPORTERS)}")
    format, read = name, IMPORTERS[name].read
    if isinstance(path, FarPath) and not IMPORTERS[name].reads_urls:
        raise DataError(f"{path}: format {format!r} reads from disk only: copy it first")
    try:
        inspect.signature(read).bind(path, **options)
    except TypeError as error:
        known = ", ".join(list(inspect.signature(read).parameters)[1:]) or "none"
        raise DataError(f"format {format!r}: {error} (its options: {known})") from error
    return read(path, **options)


register("jsonl", read_jsonl, reads_urls=True)
