"""Rows of a JSON file: one object per line, or one list of objects. Read piece by piece, whatever the file's size."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from data_pipeline.errors import DataError
from data_pipeline.importers.rows.far_path import AnyPath
from data_pipeline.samples.schema import MAX_JSON_BYTES, SampleError

_PIECE = 1 << 20
_TOKEN = re.compile(rb'(?>[^"{}\[\]]+|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+(["{}\[\]])', re.DOTALL)
"""The next bracket that is in no string, or a quotation mark whose string has no end yet."""
_BETWEEN = b" \t\r\n,"


def cut(path: AnyPath, rows: int) -> Iterator[tuple[int, int, int]]:
    """(first row, row after the last, byte of the first) of ranges of at most `rows` rows.

    Raises:
        DataError: the file begins as a list, and is no list of objects or is cut off.
    """
    begin = end = offset = 0
    for number, (place, _) in enumerate(_texts(path, 0)):
        if number % rows == 0:
            if number:
                yield begin, number, offset
            begin, offset = number, place
        end = number + 1
    if end > begin:
        yield begin, end, offset


def read(path: AnyPath, begin: int, end: int, offset: int) -> Iterator[dict[str, Any] | SampleError]:
    """Rows `begin` to `end`, whose first begins at byte `offset`; a SampleError in the place of what is no object."""
    for _, (_, text) in zip(range(begin, end), _texts(path, offset), strict=False):
        if text is None:
            yield SampleError(f"a row of more than {MAX_JSON_BYTES:,} bytes")
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield SampleError(f"not JSON: {error}")
            continue
        yield row if isinstance(row, dict) else SampleError("not a JSON object")


def _texts(path: AnyPath, offset: int) -> Iterator[tuple[int, bytes | None]]:
    """(byte of its start, text) of every row from one that begins at `offset` on; None for one that is too long."""
    try:
        with path.open("rb") as file:
            is_list = _first(file) == b"["
            if offset or not is_list:
                file.seek(offset)
            yield from (_elements(file, path) if is_list else _lines(file))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error


def _first(file: BinaryIO) -> bytes:
    """The first byte that is not blank; the file stands behind it."""
    while (byte := file.read(1)) and byte in b" \t\r\n\xef\xbb\xbf":
        pass
    return byte


def _lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    offset = file.tell()
    while line := file.readline(MAX_JSON_BYTES + 1):
        size, is_long = len(line), len(line) > MAX_JSON_BYTES
        while is_long and not line.endswith(b"\n") and (line := file.readline(_PIECE)):
            size += len(line)
        if is_long or line.strip():
            yield offset, None if is_long else line
        offset += size


def _elements(file: BinaryIO, path: AnyPath) -> Iterator[tuple[int, bytes | None]]:
    """The objects of a list, the file standing inside of it."""
    end, text = file.tell(), b""  # where `text` ends in the file
    start, position, depth = 0, 0, 0  # of the object in `text`; what was looked at; brackets that are open
    is_long = False  # the object, of which nothing is kept then

    def place(index: int) -> int:
        return end - len(text) + index

    while True:
        piece = file.read(max(_PIECE, len(text)))  # a string without end is looked at anew with each piece
        end, text = end + len(piece), text + piece
        while (token := _TOKEN.match(text, position)) is not None and token[1] != b'"':
            position = token.end()
            if depth == 0:
                between = text[start : position - 1].strip(_BETWEEN)
                if token[1] == b"]" and not between:
                    return
                if token[1] not in b"{[" or between:
                    raise DataError(f"{path}, byte {place(start):,}: not a list of JSON objects")
                start = position - 1
            depth += 1 if token[1] in b"{[" else -1
            if depth == 0:
                if not is_long:
                    yield place(start), text[start:position] if position - start <= MAX_JSON_BYTES else None
                start, is_long = position, False
        if not piece:
            raise DataError(f"{path}: the list of JSON objects is cut off after byte {place(start):,}")
        text, position, start = text[start:], position - start, 0
        if depth == 0:
            text, position = text.lstrip(_BETWEEN), 0
            if text:  # no bracket in it: of a list of numbers the whole file
                raise DataError(f"{path}, byte {place(0):,}: not a list of JSON objects")
        if not is_long and len(text) > MAX_JSON_BYTES:
            yield place(0), None
            is_long = True
        if is_long:
            text, position = _open_string(text, token), 0


def _open_string(text: bytes, quote: re.Match[bytes] | None) -> bytes:
    """What is left of a text that is not kept: the string in which it ends, as far as what follows depends on it."""
    if quote is None:
        return b""
    return b'"\\' if (len(text) - len(text.rstrip(b"\\"))) % 2 else b'"'
