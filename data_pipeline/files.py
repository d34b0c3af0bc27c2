"""Files that outlive a crash, damage and a full disk: how they are written, and one way to read each kind of them.

- A cache can be made again: `read_or_make` makes it anew when it is damaged.
- A record says what happened: `read_json` and `read_json_lines` read what can be read and say how much could not.
- What is needed and damaged ends the command: `read_needed` names the file and the way out in one line.

Folders that must appear as a whole are written beside their place and renamed by their writers.
"""

from __future__ import annotations

import fcntl
import io
import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from data_pipeline.checksums import crc32
from data_pipeline.errors import DataError

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")
P = TypeVar("P")
_SEAL = b"\ncrc32 %08x\n"
"""What stands behind the numbers of an array, where numpy does not look."""
_SEAL_BYTES = len(_SEAL % 0)
log = logging.getLogger(__name__)


def read_or_make(path: Path, read: Callable[[Path], T | None], make: Callable[[], T]) -> T:
    """What a cache holds, or `make()` where it is missing, out of date (`read` gives None) or damaged (`read` raises).

    Damage is one warning. `make` also writes the cache.
    """
    try:
        found = read(path)
    except FileNotFoundError:
        found = None
    except Exception as error:  # a parser may raise anything when the bytes are damaged
        log.warning("%s cannot be read and is made anew (%s)", path, reason(error))
        found = None
    return make() if found is None else found


def read_needed(path: P, read: Callable[[P], T], way_out: str) -> T:
    """What a file, or an object of that URL, holds that nothing can replace.

    Raises:
        DataError: it is missing or damaged; one line with the file, what is wrong with it, and the way out.
    """
    try:
        return read(path)
    except DataError:
        raise
    except Exception as error:  # a parser may raise anything when the bytes are damaged
        raise DataError(f"{path} cannot be read ({reason(error)}); {way_out}") from error


def read_json(path: Path, shape: Any = dict) -> dict[str, Any]:
    """The object in a JSON file; {} when there is none, and with a warning when it is damaged or has another shape.

    `shape` is what `has_shape` understands.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s cannot be read and is passed over (%s)", path, reason(error))
        return {}
    if not isinstance(content, dict) or not has_shape(content, shape):
        log.warning("%s does not hold what it should and is passed over", path)
        return {}
    return content


def read_json_lines(path: Path, shape: Any = dict) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, as `read_new_lines` finds them; none when there is no file.

    A file that cannot be opened is a warning.
    """
    try:
        with path.open("rb") as file:
            return read_new_lines(file, shape=shape)[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("%s cannot be read and is passed over (%s)", path, reason(error))
        return []


def read_new_lines(file: BinaryIO, start: int = 0, shape: Any = dict) -> tuple[list[dict[str, Any]], int]:
    """(objects of the lines from byte `start` on, byte behind the last whole line), for files that are appended to.

    A last line without its end is still being written, or was cut off by a crash: it is left out and not counted.
    Whole lines without a JSON object of this shape (the remains of a crash, damage) are left out with one warning.
    """
    file.seek(start)
    data = file.read()
    end = data.rfind(b"\n") + 1
    rows, left_out = [], []
    for line in data[:end].splitlines():
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = line
        if isinstance(row, dict) and has_shape(row, shape):
            rows.append(row)
        elif row is not None:
            left_out.append(line)
    if left_out:
        name = getattr(file, "name", "file")
        log.warning("%s: left out %d damaged line(s), the first of them %.80r", name, len(left_out), left_out[0])
    return rows, start + end


def check_name(name: str) -> str:
    """The name itself when it stays inside its folder; DataError for absolute paths, `..` and NUL."""
    climbs = ".." in name and ".." in name.replace("\\", "/").split("/")
    if not name or name.startswith(("/", "\\")) or "\x00" in name or climbs:
        raise DataError(f"{name!r} leaves its folder: names of shards and members are relative, without '..'")
    return name


def files_below(folder: Path) -> list[Path]:
    """All files below a folder, sorted, also in folders that are links; not those that lead back to one above.

    A link to nothing is one of them: whoever needs it says so. Raises DataError for a folder that cannot be listed.
    """
    found, errors = list[Path](), list[OSError]()
    ways = {os.fspath(folder): {os.path.realpath(folder)}}  # folder -> where it and those above it really are
    for place, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        above = ways.pop(place)
        paths = (Path(place, name) for name in names)
        found += [path for path in paths if os.path.isfile(path) or not os.path.exists(path)]
        real = {name: os.path.realpath(os.path.join(place, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in above]
        ways |= {os.path.join(place, name): above | {real[name]} for name in folders}
    for error in errors:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise DataError(f"{error.filename}: its files cannot be listed: {error.strerror}") from error
    return sorted(found)


def has_shape(value: Any, shape: Any) -> bool:
    """Whether JSON data has a shape: a type, [shape of every item], {key: shape}, {str: shape of every value}, a test.

    A key that ends in `?` may be missing or null, and keys that are not named are free. An integer has 64 bits and is a
    float too; a boolean is no number. A test is a function of the value.
    """
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        if str in shape:
            return all(has_shape(item, shape[str]) for item in value.values())
        return all(_has_key(value, key, inner) for key, inner in shape.items())
    if not isinstance(shape, type):
        return bool(shape(value))
    if isinstance(value, bool):
        return shape is bool
    if isinstance(value, int) and abs(value) >> 63:
        return False
    return isinstance(value, (int, float) if shape is float else shape)


def _has_key(value: Mapping[str, Any], key: str, shape: Any) -> bool:
    name = key.removesuffix("?")
    return (name != key and value.get(name) is None) or has_shape(value.get(name), shape)


def reason(error: BaseException) -> str:
    """An exception in one short line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())[:200]
    return text if " " in text else f"{type(error).__name__} {text}".rstrip()


@contextmanager
def locked(path: Path, way_out: str) -> Iterator[None]:
    """One process at a time holds the lock file `path`; its folder is made.

    Where a file system has no locks all go on, so what is made under it must be written as a whole.

    Raises:
        DataError: the file cannot be opened; one line that ends with the way out.
    """
    with must_write(path, way_out):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("wb")
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def must_write(path: Path, way_out: str) -> Iterator[None]:
    """Open around writing what a command cannot do without: an OSError becomes a DataError of one line."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written ({reason(error)}); {way_out}") from error


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
    """Replace a file as a whole or not at all (`open_atomic`).

    Text is written as UTF-8; what UTF-8 cannot hold (a lone surrogate) becomes its escape, which JSON reads back.
    """
    with open_atomic(path) as file:
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps`, with null for NaN and infinities: JSON has no such numbers, and other readers refuse them."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace a file by one JSON object per line, atomically."""
    write_atomic(path, "".join(to_json(row, ensure_ascii=False) + "\n" for row in rows))


class JsonLinesLog:
    """Appends JSON objects to a file, one line each, at once. Lines that the disk does not take wait in memory.

    So a full disk never stops who writes: what waits is tried again with every further line. The first failure is a
    warning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: io.FileIO | None = None
        self._waiting = bytearray()
        self._complained = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a line, after those that wait."""
        self._waiting += to_json(row).encode() + b"\n"
        self._write()

    def close(self) -> None:
        """Write what still waits; a warning says how many lines are lost."""
        self._write()
        if self._waiting:
            log.warning("%s: %d line(s) could not be written and are lost", self.path, self._waiting.count(b"\n"))
        if self._file is not None:
            self._file.close()

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = self._open()
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
            self._complained = False
        except OSError as error:
            if not self._complained:
                log.warning("%s cannot be written (%s): its lines wait in memory", self.path, reason(error))
            self._complained = True

    def _open(self) -> io.FileIO:
        """The file at its end; a last line that a crash cut off is ended first, or the next one would be lost too."""
        file = io.FileIO(self.path, "a+")
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                self._waiting[:0] = b"\n"
        return file


def save_array(path: Path, array: np.ndarray) -> None:
    """Replace an `.npy` file, with a checksum behind its numbers; `numpy.load` reads it too."""
    import numpy

    buffer = io.BytesIO()
    numpy.save(buffer, array, allow_pickle=False)
    with open_atomic(path) as file:
        file.write(buffer.getbuffer())
        file.write(_SEAL % crc32(buffer.getbuffer()))


def load_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The array of `save_array`, memory-mapped and read-only.

    Raises:
        OSError: it cannot be opened. ValueError: it is damaged, or has another type or shape.
    """
    import numpy

    with path.open("rb") as file:
        checksum = crc32_of(file, os.fstat(file.fileno()).st_size - _SEAL_BYTES)
        if file.read(_SEAL_BYTES + 1) != _SEAL % checksum:
            raise ValueError("its checksum is missing or does not fit its numbers")
    array = numpy.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype != dtype or array.shape != shape:
        raise ValueError(f"it holds {array.dtype} {array.shape}, not {numpy.dtype(dtype)} {shape}")
    return array


def crc32_of(file: BinaryIO, size: int, advance: Callable[[int], object] = lambda count: None) -> int:
    """CRC-32 of the next `size` bytes of a stream, or of those that are left; `advance` hears of each block."""
    checksum = 0
    while size > 0 and (block := file.read(min(size, 1 << 22))):
        checksum = crc32(block, checksum)
        size -= len(block)
        advance(len(block))
    return checksum
