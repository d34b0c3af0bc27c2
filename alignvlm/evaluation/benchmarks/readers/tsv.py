"""VLMEvalKit's TSV files: images as base64 in a cell of megabytes, read row by row."""

from __future__ import annotations

import base64
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.readers.records import Only, Record, Wanted, existing, listed
from alignvlm.metrics.relaxed_accuracy import answers_in_cell

MAX_REFERENCE = 64
"""An image cell of at most so many characters is the index of the row whose image it shares."""


@dataclass(frozen=True)
class Tsv:
    """What VLMEvalKit calls the benchmark's file."""

    names: tuple[str, ...]
    only: Only | None = None
    """Where the file holds more than the benchmark."""

    @property
    def published(self) -> tuple[str, ...]:
        """Names of its published files, without endings."""
        return (*self.names, *(f"{name}_local" for name in self.names))


class TsvReader:
    """Rows of a TSV; all cells are text, also `NA`, `None` and empty ones, which pandas would take for missing."""

    layout = "vlmevalkit"
    size: int | None = None

    def __init__(self, file: Path, only: Only | None = None) -> None:
        self.files, self.notes, self.only = [file], list[str](), only
        self._offsets: dict[str, int] = {}
        with file.open("rb") as stream:
            self.columns = next(_cells(stream, 0), (0, []))[1]
        if not self.columns:
            raise UserError(f"{file}: the file is empty")
        needed = [("index",), ("question",), ("image", "image_path"), *([(only.column,)] if only else [])]
        for names in needed:
            if not set(names) & set(self.columns):
                raise UserError(
                    f"{file}: there is no column {' or '.join(map(repr, names))}, only {listed(self.columns)}"
                )

    def records(self, wanted: Wanted, end: int | None = None) -> Iterator[tuple[int, Record]]:
        """Rows with `images`, a list of encoded images or files, for the column `image` or `image_path`."""
        file = self.files[0]
        with file.open("rb") as stream:
            rows = _cells(stream, 0)
            next(rows)
            placed = ((f"{file}, row {row}", cells) for row, (_, cells) in enumerate(rows))
            for number, (place, cells) in enumerate(row for row in placed if self._belongs(*row)):
                if end is not None and number >= end:
                    return
                if wanted(number):
                    yield number, self._record(cells, place)

    def end(self, limit: int) -> int:
        """The rows are independent."""
        return limit

    def _belongs(self, place: str, cells: list[str]) -> bool:
        return self.only is None or self.only.keeps(self._named(cells, place)[self.only.column], place)

    def _named(self, cells: list[str], place: str) -> Record:
        if len(cells) != len(self.columns):
            raise UserError(f"{place}: {len(cells)} cells for {len(self.columns)} columns")
        return Record(dict(zip(self.columns, cells, strict=True)), place)

    def _record(self, cells: list[str], place: str) -> Record:
        record = self._named(cells, place)
        record["images"] = self._images(record)
        return record

    def _images(self, record: Record) -> list[bytes | Path]:
        if record.get("image"):
            return [self._decoded(cell, record) for cell in self._shared(record)]
        names = answers_in_cell(record.text("image_path"))
        file = self.files[0]
        folder = file.parent / "images" / file.stem.removesuffix("_local")
        if not names or not names[0]:
            raise record.wrong("image_path", "is empty")
        return [existing(folder, name, record.place, "image_path") for name in names]

    def _shared(self, record: Record) -> list[str]:
        """The image cell's members, of the row that it refers to where it does."""
        cell = record["image"]
        seen = {record["index"]}
        while len(cell) <= MAX_REFERENCE and not cell.startswith("["):
            if cell in seen:
                raise record.wrong("image", f"refers to row {cell!r}, which has no image of its own")
            seen.add(cell)
            cell = self._cell_of(cell, record)
        return answers_in_cell(cell)

    def _cell_of(self, index: str, record: Record) -> str:
        file = self.files[0]
        position = self.columns.index("index")
        if not self._offsets:
            with file.open("rb") as stream:
                self._offsets = {cells[position]: start for start, cells in _cells(stream, 0) if len(cells) > position}
        if index not in self._offsets:
            raise record.wrong("image", f"is neither an image nor the index of a row: {index!r}")
        with file.open("rb") as stream:
            stream.seek(self._offsets[index])
            _, cells = next(_cells(stream, self._offsets[index]))
        return cells[self.columns.index("image")]

    def _decoded(self, cell: str, record: Record) -> bytes:
        try:
            return base64.b64decode(cell, validate=True)
        except ValueError as error:  # also for letters beyond ASCII
            raise record.wrong("image", f"is not base64 ({error}): {cell[:40]!r} …") from error


def open_tsv(path: Path, source: Tsv) -> TsvReader:
    """The benchmark's TSV in a folder, the one with files beside it where there are both, or a given file.

    Raises:
        UserError: the folder has none, or the file is empty or has other columns.
    """
    if path.is_file():
        return TsvReader(path, source.only)
    for name in source.names:
        for file in (path / f"{name}_local.tsv", path / f"{name}.tsv"):
            if file.is_file():
                return TsvReader(file, source.only)
    raise UserError(f"{path}: there is no {' or '.join(f'{name}.tsv' for name in source.names)}")


def _cells(stream: Any, start: int) -> Iterator[tuple[int, list[str]]]:
    """(byte of its beginning, cells) of every row from a position on."""
    csv.field_size_limit(sys.maxsize)
    consumed = start

    def lines() -> Iterator[str]:
        nonlocal consumed
        for line in stream:
            consumed += len(line)
            yield line.decode("utf-8-sig" if consumed == len(line) else "utf-8", errors="replace")

    begin = start
    try:
        for cells in csv.reader(lines(), delimiter="\t"):
            if cells:
                yield begin, cells
            begin = consumed
    except csv.Error as error:
        raise UserError(f"{stream.name}, byte {begin}: not a row of a TSV ({error})") from error
