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
