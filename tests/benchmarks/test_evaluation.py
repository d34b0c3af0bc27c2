"""`benchmarks/evaluation.py`: its TSV is opened and read by the readers of the package."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.files import read_json_lines
from tests.checkout import ROOT


def test_a_small_run_of_the_large_tsv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    found = __import__("evaluation").large_tsv(tmp_path, 24, 0.002)
    assert found["rows"] == 24
    assert found["open_seconds"] < 1
    assert found["read_megabytes"] < 200
    (part,) = (tmp_path / "parts").glob("*.jsonl")
    assert [row["index"] for row in sorted(read_json_lines(part), key=lambda row: row["index"])] == list(range(24))
