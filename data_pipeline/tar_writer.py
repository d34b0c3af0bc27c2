"""Writes samples into tars, byte for byte as webdataset's own writer does with `mtime=0` and pax names.

That one imports torch, and makes every header through Python's tarfile, which takes longer than all else that is done
with a small image.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from typing import Any, BinaryIO

_LONGEST_NAME, _TOO_LARGE = 100, 8**11
"""Bytes of a name that a plain header holds, and of a member whose size it does not hold."""


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mtime, member.mode = size, 0, 0o444
    member.uname = member.gname = "bigdata"  # webdataset's own
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


_BLANK = _header("", 0)
_OWNER, _TIME, _REST = _BLANK[100:124], _BLANK[135:148], _BLANK[156:]
"""What all plain headers have between the name and the size, between it and the checksum, and behind that."""
_SUM = sum(_OWNER) + sum(_TIME) + sum(_REST) + 8 * 32  # the checksum itself counts as blanks


class TarWriter:
    """A tar that samples are written to; `close` writes its end, and leaves the file open."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, 0

    def write(self, sample: Mapping[str, Any]) -> int:
        """Write {"__key__": key, extension: bytes, …}, sorted by extension; returns the members' bytes in all."""
        before, total = sample["__key__"], 0
        for extension in sorted(sample.keys() - {"__key__"}):
            data = sample[extension]
            self._write(_plain_header(f"{before}.{extension}", len(data)))
            self._write(data)
            self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
            total += len(data)
        return total

    def close(self) -> None:
        """Two blocks of zeros, and zeros up to a whole record."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._size % tarfile.RECORDSIZE))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._size += len(data)


def _plain_header(name: str, size: int) -> bytes:
    if not name.isascii() or len(name) > _LONGEST_NAME or size >= _TOO_LARGE:
        return _header(name, size)
    text, digits = name.encode(), b"%011o" % size
    return b"%b%b%b%b%06o\0 %b" % (
        text.ljust(_LONGEST_NAME, b"\0"), _OWNER, digits, _TIME, _SUM + sum(text) + sum(digits), _REST,
    )  # fmt: skip
