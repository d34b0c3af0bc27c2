"""A generator from outside: one entry of GENERATORS, and a source of a recipe names it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.generators import GENERATORS
from data_pipeline.importers.prepare import FolderSpec, prepare_folders
from data_pipeline.shards.reader import SourceReader


def count_up(*, num_samples: int, start: int = 0) -> Iterator[dict[str, Any]]:
    for number in range(start, start + num_samples):
        turns = [{"role": "user", "content": str(number)}, {"role": "assistant", "content": str(number + 1)}]
        yield {"key": str(number), "messages": turns}


def test_a_generator_from_outside_fills_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GENERATORS, "count", count_up)
    prepare_folders([FolderSpec("numbers", str(tmp_path / "numbers"), "count", {"num_samples": 3, "start": 7})])
    reader = SourceReader(tmp_path / "numbers")
    assert [reader[i].key for i in range(len(reader))] == ["7", "8", "9"]
    assert reader.manifest.origin == {"generator": "count", "args": {"num_samples": 3, "start": 7}}
    with pytest.raises(DataError, match=r"generator 'count'.*'stop'"):
        prepare_folders([FolderSpec("more", str(tmp_path / "more"), "count", {"num_samples": 3, "stop": 7})])
