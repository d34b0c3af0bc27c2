"""The files that the authors of a benchmark publish: JSON or TSV lists of a few MB beside a folder of images."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.readers.records import Record, Wanted, existing

Rows = Callable[[Any], Iterable[dict[str, Any]]]
"""The content of one file -> its rows."""


@dataclass(frozen=True)
class Original:
    """Where the files of a benchmark are in its folder, and how they become rows."""

    files: tuple[str, ...]
    """Globs."""
    rows: Rows = iter
    """Content of a JSON file, or the list of objects of JSON lines or a TSV, as rows."""
    image: Callable[[Record], str] | None = None
    """Path of a row's image below one of `image_folders`."""
    image_folders: tuple[str, ...] = (".",)
    """Relative to the file's folder."""
    read: Callable[[Path], Iterable[dict[str, Any]]] | None = None
    """A file of another form as rows, instead of `rows`."""
    together: str | None = None
    """Neighbouring rows with the same value in this column are never separated by a limit."""


class OriginalReader:
    """Rows of one or several files of the authors."""

    layout = "original"

    def __init__(self, files: list[Path], source: Original) -> None:
        self.files, self.source, self.notes = files, source, list[str]()
        self._rows: list[tuple[Path, dict[str, Any]]] = []
        for file in files:
            try:
                rows = source.rows(_content(file)) if source.read is None else source.read(file)
                self._rows += [(file, dict(row)) for row in rows]
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise UserError(f"{file}: not the file of this benchmark ({type(error).__name__}: {error})") from error
        if not self._rows:
            raise UserError(f"{files[0]}: there is nothing in it")
        self.size: int | None = len(self._rows)

    def records(self, wanted: Wanted, end: int | None = None) -> Iterator[tuple[int, Record]]:
        """Rows with the column `image` (a file) where the benchmark has images, and `__file__`."""
        for number, (file, row) in enumerate(self._rows[:end]):
            if wanted(number):
                record = Record(row | {"__file__": file.name}, f"{file}, item {number}")
                if self.source.image is not None:
                    record["image"] = self._image(self.source.image(record), file, record.place)
                yield number, record

    def end(self, limit: int) -> int:
        """Rows that belong together stay together; the others are independent."""
        column = self.source.together
        rows = [row for _, row in self._rows]
        while column is not None and 0 < limit < len(rows) and rows[limit][column] == rows[limit - 1][column]:
            limit += 1
        return min(limit, len(rows))

    def _image(self, name: str, file: Path, place: str) -> Path:
        folders = [file.parent / folder for folder in self.source.image_folders]
        found = (folder for folder in folders if (folder / str(name)).is_file())
        return existing(next(found, folders[0]), name, place, "image")


def open_original(path: Path, source: Original) -> OriginalReader:
    """The benchmark's files below a folder, or a given file. Raises UserError when there is none."""
    if path.is_file():
        return OriginalReader([path], source)
    files = sorted({file for pattern in source.files for file in path.glob(f"**/{pattern}")})
    if not files:
        raise UserError(f"{path}: there is no {' or '.join(source.files)}")
    return OriginalReader(files, source)


def _content(file: Path) -> Any:
    text = file.read_text(encoding="utf-8")
    if file.suffix in (".tsv", ".tagged"):
        return list(csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
    try:
        return json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
