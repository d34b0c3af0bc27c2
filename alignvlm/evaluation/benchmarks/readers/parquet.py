"""Hugging Face datasets on disk: parquet files of one config and split, with images as structs of bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.readers.records import Only, Record, Wanted
from data_pipeline.files import reason

BATCH = 16
"""Rows that are Python values at once; pyarrow holds a page of the file, a row group at most."""
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)^---\s*$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Join:
    """Images in a config of their own: read once into memory."""

    config: str
    key: str
    """Column of the questions that names an image."""
    of: str
    """Column of the images that it names."""
    column: str
    """Column of the images that is added to the questions."""


@dataclass(frozen=True)
class Parquet:
    """Which part of a dataset a benchmark reads."""

    splits: tuple[str, ...]
    config: str | None = None
    """Name of the config; None takes all configs that there are, such as the subjects of MMMU."""
    otherwise: Parquet | None = None
    """What is read where there are no such files."""
    join: Join | None = None
    examples: tuple[str, str] | None = None
    """A split whose rows are examples for those with the same value in a column."""
    not_in_name: str | None = None
    """A word in the dataset's name that says it is another benchmark's."""
    siblings: tuple[str, ...] = ()
    """Configs of the same dataset that are other benchmarks'."""
    only: Only | None = None
    """Where the split holds more than the benchmark."""


class ParquetReader:
    """Rows of parquet files, a few at a time."""

    layout = "huggingface"

    def __init__(self, files: Sequence[Path], only: Only | None = None) -> None:
        self.files, self.notes = list(files), list[str]()
        self._kept = [_kept(file, only) for file in self.files]
        self.size: int | None = sum(map(sum, self._kept))
        if self.size == 0:
            missing = "there are no rows in it" if only is None else f"no row has {only.column} {only.value!r}"
            raise UserError(f"{self.files[0]}: {missing}")
        self.images: tuple[Join, dict[Any, Any]] | None = None
        self.examples: tuple[str, list[Record]] | None = None

    def records(self, wanted: Wanted, end: int | None = None) -> Iterator[tuple[int, Record]]:
        """Rows as Python values, with the file's name in column `__file__`, and joined images and examples."""
        number = 0
        for file, kept in zip(self.files, self._kept, strict=True):
            following = number + sum(kept)
            stop = following if end is None else min(following, end)
            if any(wanted(n) for n in range(number, stop)):
                for row, record in _rows(file, kept, number, stop, wanted):
                    yield row, self._completed(record)
            number = following

    def end(self, limit: int) -> int:
        """The rows are independent."""
        assert self.size is not None
        return min(limit, self.size)

    def _completed(self, record: Record) -> Record:
        if self.images is not None:
            join, images = self.images
            if record[join.key] not in images:
                raise record.wrong(join.key, f"names no image of config {join.config!r}: {record[join.key]!r}")
            record[join.column] = images[record[join.key]]
        if self.examples is not None:
            column, examples = self.examples
            record["__examples__"] = [example for example in examples if example[column] == record[column]]
        return record


def open_parquet(path: Path, source: Parquet) -> ParquetReader:
    """The files of the benchmark's split in a dataset folder, or one file.

    Raises:
        UserError: no file belongs to the split, the dataset is another benchmark's, or pyarrow is not installed.
    """
    if source.not_in_name and source.not_in_name in path.absolute().name:
        raise UserError(f"{path}: its name says {source.not_in_name!r}: it is the dataset of another benchmark")
    if path.is_file():
        if source.join is not None:
            raise UserError(f"{path}: give the dataset's folder; images are in its config {source.join.config!r}")
        return ParquetReader(_not_of_siblings([path], source), source.only)
    reader = ParquetReader(_not_of_siblings(_files_of(path, source), source), source.only)
    if source.join is not None:
        images = ParquetReader(_files_of(path, Parquet(source.splits, source.join.config)))
        rows = images.records(lambda number: True)
        reader.images = source.join, {row[source.join.of]: row[source.join.column] for _, row in rows}
    if source.examples is not None:
        split, column = source.examples
        files = _found(path, Parquet((split,), source.config)) or _found(path, Parquet((split,)))
        reader.examples = column, [row for file in files for _, row in ParquetReader([file]).records(lambda n: True)]
        if not files:
            reader.notes.append(f"there is no split {split!r}: asked without examples")
    return reader


def _files_of(path: Path, source: Parquet) -> list[Path]:
    files = _found(path, source) or (_found(path, source.otherwise) if source.otherwise else [])
    if not files:
        found = sorted(str(file.relative_to(path)) for file in path.rglob("*.parquet"))
        shown = ", ".join(found[:8]) + (", …" if len(found) > 8 else "")
        config = f" of config {source.config!r}" if source.config else ""
        raise UserError(f"{path}: no parquet file of split {' or '.join(source.splits)}{config} among {shown}")
    return files


def _not_of_siblings(files: list[Path], source: Parquet) -> list[Path]:
    for file in files:
        config = file.absolute().parent.name
        if config in source.siblings:
            raise UserError(f"{file}: its folder is config {config!r} of the dataset, not {source.config!r}")
    return files


def _found(path: Path, source: Parquet) -> list[Path]:
    return _of_card(path, source) or _of_names(path, source)


def _of_card(root: Path, source: Parquet) -> list[Path]:
    """Files that the dataset card (README.md) names for the config and the splits; [] where it names none."""
    card = root / "README.md"
    match = FRONT_MATTER.search(card.read_text(encoding="utf-8", errors="replace")) if card.is_file() else None
    if match is None:
        return []
    try:
        configs = (yaml.safe_load(match[1]) or {}).get("configs") or []
        entries = [
            (str(entry["split"]), entry["path"])
            for config in configs
            if source.config is None or config.get("config_name", "default") == source.config
            for entry in config.get("data_files") or []
        ]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{card}: its list of configs cannot be read ({' '.join(str(error).split())[:200]})") from error
    patterns_of_splits = [
        pattern
        for split, patterns in entries
        if split in source.splits
        for pattern in ([patterns] if isinstance(patterns, str) else patterns)
    ]
    try:
        files = {file for pattern in patterns_of_splits for file in root.glob(pattern) if file.is_file()}
    except (NotImplementedError, ValueError, TypeError) as error:  # such as an absolute path
        raise UserError(f"{card}: its list of configs names files that cannot be found below it ({error})") from error
    return _inside(root, sorted(files))


def _of_names(root: Path, source: Parquet) -> list[Path]:
    """Files whose names begin with a split, in a folder of the config where there is one."""
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, source.splits))})(?:-\d+.*)?\.parquet")
    files = sorted(file for file in root.rglob("*.parquet") if pattern.fullmatch(file.name))
    if source.config is None:
        return files
    of_config = [file for file in files if source.config in file.relative_to(root).parts[:-1]]
    return of_config or [file for file in files if file.parent in (root, root / "data")]


def _inside(root: Path, files: list[Path]) -> list[Path]:
    for file in files:
        if not file.resolve().is_relative_to(root.resolve()) and not file.is_symlink():
            raise UserError(f"{root / 'README.md'} names {file}, which is outside of the folder")
    return files


def _kept(file: Path, only: Only | None) -> list[bool]:
    """Whether each row of a file belongs to the benchmark; one column is read for that."""
    opened = _open(file)
    if only is None:
        return [True] * opened.metadata.num_rows
    names = Record({name: name for name in opened.schema_arrow.names}, str(file))  # says which are there
    with _whole(file):
        values = opened.read(columns=[names[only.column]]).column(0).to_pylist()
    return [only.keeps(value, f"{file}, row {row}") for row, value in enumerate(values)]


def _rows(file: Path, kept: Sequence[bool], number: int, stop: int, wanted: Wanted) -> Iterator[tuple[int, Record]]:
    row = -1
    with _whole(file):
        for batch in _open(file).iter_batches(batch_size=BATCH):
            names = batch.schema.names
            for position in range(batch.num_rows):
                row += 1
                if number >= stop:
                    return
                if not kept[row]:
                    continue
                if wanted(number):
                    values = {name: batch.column(i)[position].as_py() for i, name in enumerate(names)}
                    yield number, Record(values | {"__file__": file.name}, f"{file}, row {row}")
                number += 1


def _open(file: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError("parquet files need pyarrow: pip install 'alignvlm[parquet]'") from error
    with _whole(file):
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)


@contextmanager
def _whole(file: Path) -> Iterator[None]:
    """What goes wrong with a file, when it is opened or where it is damaged, is one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a parquet file that can be read ({reason(error)})") from error
