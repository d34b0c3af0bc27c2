"""Rows of parquet and Arrow files. The only module that imports pyarrow, which comes with the extra `parquet`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.files import reason
from data_pipeline.importers.rows.far_path import AnyPath, FarPath
from data_pipeline.samples.schema import SampleError

_END = b"\xff\xff\xff\xff\0\0\0\0"
"""How a stream ends."""
_WAY_OUT = "download or write it again"
_BATCH = 64
"""Rows that are Python values at once; each may hold several images."""


def cut(path: AnyPath, rows: int) -> Iterator[tuple[int, int, int]]:
    """(first row, row after the last, 0) of ranges of at most `rows` rows: whole row groups, or parts of a large one.

    Raises:
        DataError: no such file, or damage.
    """
    begin = end = 0
    for group in _group_sizes(path):
        if end > begin and end + group - begin > rows:
            yield begin, end, 0
            begin = end
        end += group
        while end - begin > rows:
            yield begin, begin + rows, 0
            begin += rows
    if end > begin:
        yield begin, end, 0


def read(path: AnyPath, begin: int, end: int, offset: int = 0) -> Iterator[dict[str, Any] | SampleError]:
    """Rows `begin` to `end` as Python values; a SampleError in the place of one that has none (text that is not UTF-8).

    Raises:
        DataError: the file is damaged.
    """
    with _errors(path):
        for first, batch in _batches(path, begin, end):
            low, high = max(begin - first, 0), min(end - first, len(batch))
            for start in range(low, high, _BATCH):
                yield from _rows(batch.slice(start, min(_BATCH, high - start)))


def _rows(batch: Any) -> Iterator[dict[str, Any] | SampleError]:
    """The rows of a batch: at once, or one by one where that fails."""
    try:
        batch.validate(full=True)  # of damaged offsets pyarrow makes a crash
        yield from batch.to_pylist()
    except (ValueError, OverflowError) as error:  # ArrowInvalid and UnicodeDecodeError are ValueErrors
        if len(batch) == 1:
            yield SampleError(f"it cannot be read ({reason(error)})")
            return
        for number in range(len(batch)):
            yield from _rows(batch.slice(number, 1))


def _batches(path: AnyPath, begin: int, end: int) -> Iterator[tuple[int, Any]]:
    """(number of its first row, record batch) of batches with these rows."""
    first = 0
    if path.suffix.lower() != ".parquet":
        for batch in _arrow_batches(path):
            if first >= end:
                return
            if first + len(batch) > begin:
                yield first, batch
            first += len(batch)
        return
    with _open_parquet(path) as file:
        for group, size in enumerate(_group_sizes(path)):
            if first < end and first + size > begin:
                start = first
                for batch in file.iter_batches(_BATCH, row_groups=[group], use_threads=False):
                    if start >= end:
                        return
                    yield start, batch
                    start += len(batch)
            first += size


def _group_sizes(path: AnyPath) -> Iterator[int]:
    """Rows of each row group (parquet) or record batch (Arrow)."""
    with _errors(path):
        if path.suffix.lower() != ".parquet":
            yield from (len(batch) for batch in _arrow_batches(path))
            return
        with _open_parquet(path) as file:
            sizes = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
            if sum(sizes) != file.metadata.num_rows:
                raise ValueError(f"its row groups have {sum(sizes)} rows, not {file.metadata.num_rows}")
            yield from sizes


def _open_parquet(path: AnyPath) -> Any:
    _import(path)
    from pyarrow.parquet import ParquetFile

    if isinstance(path, FarPath):  # a row group at once: its columns are neighbours, and so one request
        return ParquetFile(path.open("rb", buffering=0), pre_buffer=True, arrow_extensions_enabled=False)
    return ParquetFile(path, pre_buffer=False, buffer_size=1 << 20, arrow_extensions_enabled=False)


def _arrow_batches(path: AnyPath) -> Iterator[Any]:
    """Record batches of a stream, as `datasets` writes them, or of a file. Their data is mapped, not read."""
    pyarrow = _import(path)
    if isinstance(path, FarPath):
        raise DataError(f"{path}: Arrow files are read from disk only, where they are mapped: copy the folder first")
    if not path.stat().st_size:
        raise DataError(f"{path} is empty: {_WAY_OUT}")
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            source.seek(0)
            file = pyarrow.ipc.open_file(source)
            yield from (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            source.seek(max(source.size() - len(_END), 0))
            if source.read(len(_END)) != _END:  # pyarrow takes the end of the file for the end of the rows
                raise DataError(f"{path} is cut off: it does not end with the mark of Arrow streams; {_WAY_OUT}")
            source.seek(0)
            yield from pyarrow.ipc.open_stream(source)


def _import(path: AnyPath) -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise DataError(f"{path}: reading it needs pyarrow: pip install 'alignvlm[parquet]'") from error
    return pyarrow


@contextmanager
def _errors(path: AnyPath) -> Iterator[None]:
    """What pyarrow says of a file that is damaged or missing, as a DataError of one line."""
    pyarrow = _import(path)
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path} cannot be read: {reason(error)}; {_WAY_OUT}") from error
