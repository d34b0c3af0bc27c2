"""A row of a benchmark's file, whatever the layout, and what every reader of such files offers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from alignvlm.errors import UserError

Wanted = Callable[[int], bool]
"""Whether the row of a number, from 0, is needed: the others are passed over without being decoded."""


@dataclass(frozen=True)
class Only:
    """Which rows of a file belong to the benchmark: the others are passed over and have no number."""

    column: str
    value: str
    others: tuple[str, ...]
    """What else may stand in the column."""

    def keeps(self, value: Any, place: str) -> bool:
        """Whether a row with this value belongs to the benchmark. Raises UserError for one that may not be there."""
        known = (self.value, *self.others)
        if value not in known:
            raise UserError(f"{place}: column {self.column!r} must be {' or '.join(known)}, not {value!r:.80}")
        return bool(value == self.value)


class Record(dict[str, Any]):
    """The columns of one row. A column that is not there is one line for the user, with the file."""

    def __init__(self, values: dict[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place
        """File and row, for messages."""

    def __missing__(self, column: str) -> Any:
        raise UserError(
            f"{self.place}: there is no column {column!r}, only {listed(self)}; is this the file of another benchmark?"
        )

    def text(self, column: str) -> str:
        """A column as text. Raises UserError when it is empty (null)."""
        value = self[column]
        if value is None:
            raise self.wrong(column, "is empty")
        return str(value)

    def texts(self, column: str) -> list[str]:
        """A column that is a list of texts. Raises UserError when it is none, or has nothing in it."""
        value = self[column]
        if not isinstance(value, list) or not value:
            raise self.wrong(column, f"must be a list with something in it, not {value!r:.80}")
        return [str(member) for member in value]

    def image(self, column: str) -> bytes | Path:
        """An encoded image: the bytes of an image struct, or a file. Raises UserError when there is none."""
        return self._image(self[column], column)

    def images(self, column: str) -> list[bytes | Path]:
        """A column that is an encoded image or a list of them. Raises UserError when there is none."""
        value = self[column]
        members = value if isinstance(value, list) else [value]
        if not members:
            raise self.wrong(column, "holds no image")
        return [self._image(member, column) for member in members]

    def _image(self, value: Any, column: str) -> bytes | Path:
        if isinstance(value, dict):
            value = value.get("bytes")
        if isinstance(value, bytes | Path):
            return value
        raise self.wrong(column, "holds no image")

    def wrong(self, column: str, what: str) -> UserError:
        """An error about a column of this row."""
        return UserError(f"{self.place}: column {column!r} {what}")


def listed(columns: Iterable[Any]) -> str:
    """Names of columns as part of one line; those that readers add are left out."""
    return " ".join(", ".join(name for name in map(str, columns) if not name.startswith("__")).split())[:300]


class Reader(Protocol):
    """An opened file, or several: nothing but its head has been read."""

    layout: str
    """Name of the layout, as results state it."""
    files: list[Path]
    """What is read, for results and messages."""
    size: int | None
    """Number of rows where it is known without reading them all."""
    notes: list[str]
    """What must be known about the files, for the results."""

    def records(self, wanted: Wanted, end: int | None = None) -> Iterator[tuple[int, Record]]:
        """(number, row) of the rows that are wanted, in file order, up to row `end`."""
        ...

    def end(self, limit: int) -> int:
        """Where the first `limit` rows end, with rows that belong together kept together."""
        ...


def existing(folder: Path, name: Any, place: str, column: str) -> Path:
    """An image file below a folder. Raises UserError naming row and column: it is not there, or outside of the folder.

    Benchmark files come from others, whose names must not lead to other files of this machine.
    """
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{place}: column {column!r} must be a path below {folder}, not {name!r:.200}")
    path = folder / name
    if not path.is_file():
        raise UserError(f"{place}: the image of column {column!r} is not there: {path}")
    return path
