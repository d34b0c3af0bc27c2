"""Readers of the files that benchmarks come in: which layout a path has, and its rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.readers.docowl import Docowl, open_docowl
from alignvlm.evaluation.benchmarks.readers.original import Original, open_original
from alignvlm.evaluation.benchmarks.readers.parquet import Join, Parquet, open_parquet
from alignvlm.evaluation.benchmarks.readers.records import Only, Reader, Record
from alignvlm.evaluation.benchmarks.readers.tsv import Tsv, open_tsv

__all__ = ["Docowl", "Join", "Only", "Original", "Parquet", "Reader", "Record", "Source", "Tsv", "open_reader"]

Source = Parquet | Tsv | Docowl | Original
"""What a benchmark says about its files in one layout."""


def open_reader(path: Path, sources: Mapping[str, Source], benchmark: str) -> Reader:
    """The reader for the layout that a path has.

    Args:
        sources: layout -> what the benchmark says about it.
        benchmark: its name, for messages.

    Raises:
        UserError: the path does not exist, the layout is not known, or the benchmark is not read from it.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder (data of benchmark {benchmark!r})")
    layout = _layout_of(path, sources)
    if layout is None:
        raise UserError(f"{path}: no files of benchmark {benchmark!r} in a known layout ({', '.join(sources)})")
    source = sources.get(layout)
    if source is None:
        raise UserError(f"{path} has the layout {layout}; {benchmark!r} is read from {', '.join(sources)}")
    if isinstance(source, Parquet):
        return open_parquet(path, source)
    if isinstance(source, Tsv):
        return open_tsv(path, source)
    return open_docowl(path, source, layout) if isinstance(source, Docowl) else open_original(path, source)


def _layout_of(path: Path, sources: Mapping[str, Source]) -> str | None:
    original, tsv = sources.get("original"), sources.get("vlmevalkit")
    if path.is_file():
        return "original" if isinstance(original, Original) and path.name in original.files else _layout_of_file(path)
    if isinstance(original, Original) and any(next(path.glob(f"**/{name}"), None) for name in original.files):
        return "original"
    if isinstance(tsv, Tsv) and any(
        (path / f"{name}{end}.tsv").is_file() for name in tsv.names for end in ("", "_local")
    ):
        return "vlmevalkit"
    for layout, patterns in (
        ("docdownstream", ("test/*_test.jsonl", "*_test.jsonl")),
        ("ureader", ("test_*.jsonl",)),
        ("huggingface", ("**/*.parquet",)),
        ("vlmevalkit", ("*.tsv",)),
    ):
        if any(next(path.glob(pattern), None) for pattern in patterns):
            return layout
    return None


def _layout_of_file(path: Path) -> str | None:
    if path.suffix == ".parquet":
        return "huggingface"
    with path.open("rb") as stream:
        head = stream.readline(1 << 20)
    if not head.strip():
        raise UserError(f"{path}: the file is empty")
    if path.suffix == ".tsv":
        return "original" if head.split(b"\t")[0].strip() == b"id" else "vlmevalkit"
    if path.suffix == ".jsonl":
        try:
            row = json.loads(head)
        except ValueError as error:
            raise UserError(f"{path}: its first line is not JSON ({error})") from error
        if isinstance(row, dict) and "conversations" in row:
            return "ureader"
        return "docdownstream" if isinstance(row, dict) and "messages" in row else "original"
    return "original" if path.suffix in (".json", ".tagged") else None
