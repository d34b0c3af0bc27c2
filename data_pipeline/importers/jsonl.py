"""User data as records for the writer: a JSON-lines file of conversations and a folder of images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from reprlib import repr as brief
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.importers.rows.far_path import AnyPath, any_path
from data_pipeline.importers.rows.images import ImageFiles
from data_pipeline.samples.images import image_extension
from data_pipeline.samples.schema import MAX_JSON_BYTES, SampleError, check_key, normalise_messages
from data_pipeline.samples.turns import turn_messages


def read_jsonl(file: AnyPath, *, images: str | AnyPath | None = None) -> Iterator[dict[str, Any]]:
    """Records for `writer.write_shards`; `images` is the folder or zip archive of images (default: the file's folder).

    A line is {"messages": [{"role", "content"}], "images": [file, …]} (or "image": file) and any meta data; LLaVA's
    {"conversations": [{"from", "value"}]} is understood too. "key" is optional.

    Raises:
        DataError: names file and line of what is not JSON, not a conversation, or an image that is not there or none.
    """
    if not file.is_file():
        raise DataError(f"{file}: no such file")
    files, key = ImageFiles(file.parent if images is None else any_path(images, (".zip",))), ""
    with file.open("rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_JSON_BYTES + 1), b""), 1):
            if len(line) > MAX_JSON_BYTES:
                raise DataError(f"{file}, line {number}: more than {MAX_JSON_BYTES:,} bytes")
            if line.strip():
                key = f"{number:09d}"
                try:
                    yield _record(json.loads(line), files, key)
                except (ValueError, RecursionError, DataError, SampleError) as error:
                    raise DataError(f"{file}, line {number}: {error}") from error
    if not key:
        raise DataError(f"{file} is empty: it has a conversation per line")


def _record(row: Any, files: ImageFiles, key: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise DataError("not a JSON object")
    row = dict(row)
    if "conversations" in row and "messages" not in row:
        row["messages"] = turn_messages(row.pop("conversations"))
    if "messages" not in row:
        raise DataError(f"no 'messages' (fields: {', '.join(row)})")
    names = row.pop("images", None)
    if names is None:
        names = [row.pop("image")] if "image" in row else []
    if not isinstance(names, list):
        raise DataError(f"'images' is not a list of file names: {brief(names)}")
    record = {"key": key, **row, "images": [_read(files, name) for name in names]}
    check_key(record["key"])
    normalise_messages(record["messages"], len(record["images"]))  # the writer checks it too, but knows no lines
    return record


def _read(files: ImageFiles, name: Any) -> bytes:
    if not isinstance(name, str):
        raise DataError(f"image {brief(name)} is not a file name")
    data = files.read(name)
    try:
        image_extension(data)
    except SampleError as error:
        raise DataError(f"image {name!r}: {error}") from error
    return data
