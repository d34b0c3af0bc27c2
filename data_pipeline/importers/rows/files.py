"""Which files a published dataset has: a file, a folder of a hub repository, or what `save_to_disk` wrote."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from types import ModuleType

from data_pipeline.errors import DataError
from data_pipeline.files import files_below, has_shape, read_needed
from data_pipeline.importers.rows import arrow, json_rows
from data_pipeline.importers.rows.far_path import AnyPath, FarPath, relative
from data_pipeline.shards.storage import check_name

READERS: dict[str, ModuleType] = {
    ".parquet": arrow, ".arrow": arrow, ".json": json_rows, ".jsonl": json_rows, ".ndjson": json_rows,
}  # fmt: skip
"""Suffix of a file -> the module that cuts and reads its rows."""
_SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test|testing)(?=[-._]|$)")
"""How a file or folder that holds a split begins, as the hub knows them."""
_SAME = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}


def find_files(path: AnyPath, split: str = "") -> list[AnyPath]:
    """The files with a dataset's rows, in order.

    Args:
        path: one file, or a folder: of parquet, Arrow or JSON lines, with subfolders, or written by `save_to_disk`.
        split: which of the splits, such as `train`; needed where the folder has several.

    Raises:
        DataError: nothing to read, or splits to choose between.
    """
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(f"{path}: rows are read from {', '.join(READERS)} files")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if (path / "dataset_dict.json").is_file():
        names = _listed(path / "dataset_dict.json", {"splits": [str]}, "splits")
        return find_files(path / check_name(_choose(path, set(names), split)))
    if (path / "state.json").is_file():
        rows = _listed(path / "state.json", {"_data_files": [{"filename": str}]}, "_data_files")
        return [path / check_name(row["filename"]) for row in rows]
    for suffixes in ((".parquet",), (".arrow",), (".jsonl", ".ndjson")):
        found = [file for file in _walk(path) if file.suffix.lower() in suffixes]
        if found:
            splits = {file: _split(relative(file, path)) for file in found}
            chosen = _choose(path, set(splits.values()) - {""}, split)
            return [file for file in found if splits[file] in ("", chosen)] if chosen else found
    raise DataError(f"{path}: no parquet, Arrow or JSON lines files here; name a JSON file itself")


def _walk(folder: AnyPath) -> Iterator[AnyPath]:
    """Files below a folder, sorted; what begins with a dot (caches of downloads among it) is left out."""
    files: Iterable[AnyPath] = sorted(folder.rglob("*")) if isinstance(folder, FarPath) else files_below(folder)
    for file in files:
        if not any(part.startswith(".") for part in relative(file, folder).parts):
            yield file


def _split(file: PurePosixPath) -> str:
    """The split that a file's name or folder says; "" for none."""
    for part in (file.name, *reversed(file.parts[:-1])):
        match = _SPLIT.match(part.lower())
        if match:
            return _SAME.get(match[1], match[1])
    return ""


def _choose(path: AnyPath, splits: set[str], split: str) -> str:
    """The name of the split to read; "" where there are none. Raises DataError when that is not clear."""
    named = ", ".join(sorted(splits))
    if split and split not in splits:
        raise DataError(f"{path}: no split {split!r} (splits: {named or 'none'})")
    if not split and len(splits) > 1:
        raise DataError(f"{path} has the splits {named}: say which one, such as split={sorted(splits)[-1]}")
    return split or next(iter(splits), "")


def _listed(path: AnyPath, shape: dict[str, object], key: str) -> list:
    def read(path: AnyPath) -> list:
        content = json.loads(path.read_bytes())
        if not has_shape(content, shape):
            raise ValueError(f"it does not list {key}")
        return content[key]

    return read_needed(path, read, "write the dataset again with save_to_disk")
