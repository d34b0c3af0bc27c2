"""CRC-32: the values of zlib, however the bytes are cut, with ISA-L and without."""

from __future__ import annotations

import importlib
import itertools
import random
import sys
import zlib

import pytest

from data_pipeline import checksums


@pytest.mark.parametrize("module", ["isal.isal_zlib", "zlib"])
def test_values_are_those_of_zlib(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if module == "zlib":
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)
    try:
        crc32 = importlib.reload(checksums).crc32
        assert crc32.__module__ == module
        data = random.Random(0).randbytes(10_000)
        for cuts in ((0, 10_000), (0, 0, 1, 16, 17, 1000, 9_999, 10_000), (3, 4), tuple(range(0, 300, 7))):
            found = 0
            for begin, end in itertools.pairwise(cuts):
                found = crc32(memoryview(data)[begin:end], found)
            assert found == zlib.crc32(data[cuts[0] : cuts[-1]])
    finally:
        monkeypatch.undo()
        importlib.reload(checksums)


def test_checksums_of_parts_give_that_of_the_whole() -> None:
    data = random.Random(0).randbytes(5_000)
    for first, second in ((0, 0), (5, 0), (0, 7), (1, 4_999), (3_000, 1_234)):
        parts = data[:first], data[first : first + second]
        assert checksums.crc32_combine(*map(zlib.crc32, parts), second) == zlib.crc32(b"".join(parts))
