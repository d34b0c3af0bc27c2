"""The members of a tar archive, front to end: every header is checked, and damage is told from the end of the archive.

Reads ustar, GNU and pax headers, nothing but where the members lie; samples are tarscan.py's business. Python's tarfile
takes a damaged header, a zeroed block and the end of a cut file for the end of the archive, so it is not used here.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import BinaryIO, NamedTuple

BLOCK = 512
_PIECE = 256 * 1024
"""Bytes that are read at once: they are hashed while they are in the cache of the core."""
_ZEROS = bytes(BLOCK)
_FORM = 156
"""Where a header's type is: from here on those of one writer are mostly alike."""
_USTAR = b"ustar\0"
"""Magic of headers in which a name may have a prefix; GNU tar has times in its place."""
_RECORD = 20 * BLOCK
"""GNU tar, Python and webdataset fill an archive with zeros up to a multiple of this; others write the mark alone."""
_MAX_PADDING = 2 * 1024**2
"""More zeros at the end are no padding (GNU tar's records have up to 1 MiB), but an interrupted download."""
_MAX_EXTENDED = 1024**2
"""Longest pax header or GNU long name that is read, bytes."""
_FILES = frozenset((b"0", b"\0", b"7", b"S"))
_LINKS = frozenset((b"1", b"2"))
_WITHOUT_DATA = _LINKS | {b"3", b"4", b"5", b"6"}
_CONTROL = re.compile(r"[\x01-\x1f\x7f-\x9f\u2028\u2029]")
"""What may end a line or change a terminal. NUL is left for the check of names to refuse."""
_PAX, _PAX_OF_ALL = (b"x", b"X"), b"g"
_LONG_NAME, _LONG_LINK, _SPARSE = b"L", b"K", b"S"
_EXTENDED = frozenset((*_PAX, _PAX_OF_ALL, _LONG_NAME, _LONG_LINK))


class TarDamage(Exception):
    """What is wrong with an archive, and at which byte."""

    def __init__(self, offset: int, problem: str) -> None:
        super().__init__(problem)
        self.offset = offset


class Member(NamedTuple):
    """One entry of an archive. `header` and `data` are offsets, `size` counts bytes of data."""

    name: str
    header: int
    data: int
    size: int
    is_file: bool
    is_sparse: bool
    is_link: bool
    archive: int
    """Offset of its archive: not 0 where archives were joined."""


class _Form(NamedTuple):
    """What a header says behind its checksum."""

    kind: bytes
    prefix: bytes
    """What the member's name begins with, up to its slash."""
    total: int
    """Sum of these bytes."""


class Window:
    """The bytes of a file of `size` bytes, from front to end: many small headers and members are one read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self._file = file
        self._buffer = memoryview(bytearray(min(_PIECE, size)))
        self._begin = self._end = 0  # of the file's bytes in the buffer

    def read(self, position: int, size: int) -> bytes:
        """`size` bytes from `position`. Raises TarDamage when the file became shorter."""
        begin = position - self._begin
        if begin >= 0 and position + size <= self._end:
            return bytes(self._buffer[begin : begin + size])
        data = b"".join(self.pieces(position, size))
        if len(data) < size:
            raise TarDamage(position + len(data), "the file became shorter while it was read")
        return data

    def pieces(self, position: int, size: int) -> Iterable[memoryview]:
        """The same in pieces, each good until the next one is asked for; fewer bytes where the file became shorter."""
        begin = position - self._begin
        if begin >= 0 and position + size <= self._end:
            return (self._buffer[begin : begin + size],)
        return self._fill_and_cut(position, size)

    def _fill_and_cut(self, position: int, size: int) -> Iterator[memoryview]:
        end = position + size
        while position < end:
            if not self._begin <= position < self._end and not self._fill(position):
                return
            piece = self._buffer[position - self._begin : min(end, self._end) - self._begin]
            yield piece
            position += len(piece)

    def _fill(self, position: int) -> int:
        if position != self._end:
            self._file.seek(position)
        count: int = self._file.readinto(self._buffer[: max(self.size - position, 0)])  # type: ignore[attr-defined]
        self._begin, self._end = position, position + count
        return count


def read_members(file: Window) -> Iterator[Member]:
    """The members of a file, front to end.

    An archive ends with zero blocks: two by the standard; one at the very end of the file will do, as old writers left
    it. Archives that were joined are read one after the other.

    Raises:
        TarDamage: anything that is neither a header with a valid checksum and a possible size, nor the end.
    """
    start, position, size = 0, 0, file.size
    own: dict[str, bytes] = {}  # of the next member
    common: dict[str, bytes] = {}  # of all members that follow
    while True:
        header = file.read(position, BLOCK if position + BLOCK <= size else size - position)
        if header == _ZEROS and not own:
            following = _behind_zeros(file, start, position)
            if following is None:
                return
            start, position, common = following, following, {}
            continue
        if not header:
            raise TarDamage(position, "the file ends without an end-of-archive mark")
        if len(header) < BLOCK:
            raise TarDamage(position, "the file is cut off inside a header")
        kind, name, length = _parse(header, position, 0 < start == position)
        data = position + BLOCK
        if kind in _EXTENDED:
            if length > _MAX_EXTENDED or data + length > size:
                raise TarDamage(position, f"an extended header of {length:,} bytes is longer than any that is read")
            if kind == _LONG_NAME:
                own.setdefault("path", file.read(data, length).partition(b"\0")[0])
            elif kind == _PAX_OF_ALL:
                common |= _pax_records(file.read(data, length), data)
            elif kind in _PAX:
                own = _pax_records(file.read(data, length), data) | own
        else:
            is_folder = kind == b"\0" and name.endswith(b"/")
            is_sparse = kind == _SPARSE
            if own or common:
                stated = common | own
                name = stated["path"].rstrip(b"/") if "path" in stated else name
                length = _decimal(stated["size"], position) if "size" in stated else length
                is_sparse = is_sparse or any(key.startswith("GNU.sparse.") for key in stated)
                own = {}
            if is_folder or kind in _WITHOUT_DATA:
                length = 0
            if data + length > size:
                raise TarDamage(position, f"the member {_text(name)!r} of {length:,} bytes is cut off")
            is_file = kind in _FILES and not is_folder
            yield Member(_text(name), position, data, length, is_file, is_sparse, kind in _LINKS, start)
        position = data + -(-length // BLOCK) * BLOCK


def _behind_zeros(file: Window, start: int, begin: int) -> int | None:
    """Where the next archive begins behind the zeros from `begin` on; None at the end of the file.

    Zeros between two archives are as many as writers put there: the mark alone, where the file too ends with no more,
    or padding to a whole record. Any others are a hole: the members there are lost.
    """
    position, size = begin, file.size
    while position < size:
        data = file.read(position, min(1 << 16, size - position))
        rest = data.lstrip(b"\0")
        position += len(data) - len(rest)
        if position - begin > _MAX_PADDING:
            raise TarDamage(begin, f"more than {_MAX_PADDING:,} zero bytes are no padding but lost data")
        if rest:
            break
    else:
        return None
    position -= position % BLOCK
    mark = begin + 2 * BLOCK
    filled = start + -(-(mark - start) // _RECORD) * _RECORD
    is_padded = not any(file.read(max(size - 3 * BLOCK, 0), min(3 * BLOCK, size)))
    if position != filled and (position != mark or is_padded):
        raise TarDamage(begin, f"{position - begin:,} zero bytes with more data behind them are no end-of-archive mark")
    return position


def _parse(header: bytes, position: int, joined: bool) -> tuple[bytes, bytes, int]:
    """(type, name, size) of a header block whose checksum holds."""
    kind, prefix, total = _form(header[_FORM:])
    total += _sum(header[:148]) + 8 * 32  # the checksum's own field counts as blanks
    try:
        stated, size = _number(header[148:156]), _number(header[124:136])
    except ValueError:
        stated, size = -1, 0
    if stated != total and stated != total - 256 * _num_signed(header[:148] + header[156:]):
        if position == 0:
            raise TarDamage(position, "not a tar archive; compressed ones are unpacked first")
        what = "what lies behind the end-of-archive mark is not another archive" if joined else "a header is damaged"
        raise TarDamage(position, what)
    name = header[:100].partition(b"\0")[0]
    if size < 0:
        raise TarDamage(position, f"the member {_text(name)!r} has the size {size:,}")
    return kind, prefix + name, size


@lru_cache(maxsize=256)
def _form(rest: bytes) -> _Form:
    """What the bytes of a header say from its type on."""
    has_prefix = rest[257 - _FORM : 263 - _FORM] == _USTAR and rest[345 - _FORM] != 0
    prefix = rest[345 - _FORM : 500 - _FORM].partition(b"\0")[0] + b"/" if has_prefix else b""
    return _Form(rest[:1], prefix, _sum(rest[:256]) + _sum(rest[256:]))


def _sum(data: bytes) -> int:
    """The sum of at most 256 bytes, which is what Adler-32 begins with, in a tenth of the time that `sum` takes."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _num_signed(data: bytes) -> int:
    """Bytes that are negative where bytes have signs, as those of old writers had."""
    return sum(byte > 127 for byte in data)


def _number(field: bytes) -> int:
    """A number field: octal digits, or a signed binary number behind a set first bit."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if field[0] & 0x40 else value
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _pax_records(data: bytes, position: int) -> dict[str, bytes]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header."""
    records = {}
    begin = 0
    while begin < len(data) and data[begin]:
        digits = data[begin : begin + 20].partition(b" ")[0]
        end = begin + (int(digits) if digits.isdigit() else 0)
        key, equals, value = data[begin + len(digits) + 1 : end].partition(b"=")
        if end > len(data) or not key or not equals or not value.endswith(b"\n"):
            raise TarDamage(position + begin, "a pax header is damaged")
        records[_text(key)] = value[:-1]
        begin = end
    return records


def _decimal(value: bytes, position: int) -> int:
    if not value.isdigit() or len(value) > 20:
        raise TarDamage(position, f"a pax header states the size {_text(value)!r}")
    return int(value)


def _text(raw: bytes) -> str:
    """A name on one line: one that is not UTF-8 is read as Latin-1, and control characters as %0A and the like."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    if text.isprintable():
        return text  # nothing in it is a control character
    return _CONTROL.sub(lambda found: f"%{ord(found[0]):02X}", text)
