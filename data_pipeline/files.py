"""Files that survive a crash: the one atomic writer, and the one reader and writer of JSON lines.

Standard library only. Folders that must appear as a whole are written beside their place and renamed by their writers.
"""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)


@contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A binary stream whose content replaces `path` when the block ends; an exception or a crash leaves the old file.

    The bytes are on the disk before the file gets its name. The temporary file beside it is unique, so any number of
    processes and hosts may write the same path: the last one wins, and a reader never sees half a file.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace a file as a whole or not at all (`open_atomic`); text is written as UTF-8."""
    with open_atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by one JSON object per line, atomically."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, as `read_new_lines` finds them. Raises OSError when there is no file."""
    with path.open("rb") as file:
        return read_new_lines(file)[0]


def read_new_lines(file: BinaryIO, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """(objects of the lines from byte `start` on, byte behind the last whole line), for files that are appended to.

    A last line without its end is still being written, or was cut off by a crash: it is left out and not counted.
    Whole lines that hold no JSON object (the remains of a crash in an appended file) are left out with a warning.
    """
    file.seek(start)
    data = file.read()
    end = data.rfind(b"\n") + 1
    rows = []
    for line in data[:end].splitlines():
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = line
        if isinstance(row, dict):
            rows.append(row)
        elif row is not None:
            log.warning("%s: left out a line that holds no JSON object: %.80r", getattr(file, "name", "file"), line)
    return rows, start + end
