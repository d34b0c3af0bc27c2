"""The registry of import formats: known by name or suffix, extended from outside, mistakes named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignvlm.cli import main
from data_pipeline import importers
from data_pipeline.errors import DataError
from data_pipeline.importers import IMPORTERS, read_records, register
from data_pipeline.shards.reader import SourceReader


def read_tsv(path: Path, *, prompt: str = "Read.") -> Iterator[dict[str, Any]]:
    for number, line in enumerate(path.read_text().splitlines()):
        key, answer = line.split("\t")
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        yield {"key": key, "messages": turns, "row": number}


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table, and its format registered for this test only."""
    monkeypatch.setattr(importers, "IMPORTERS", dict(IMPORTERS))
    register("tsv", read_tsv, (".tsv",))
    path = tmp_path / "rows.TSV"
    path.write_text("a\tone\nb\ttwo\n")
    return path


@pytest.mark.parametrize("how", [["--format", "tsv"], []])
def test_a_format_from_outside_is_written_as_shards(table: Path, tmp_path: Path, how: list[str]) -> None:
    assert main(["data", "write", str(tmp_path / "out"), "--from", str(table), *how, "prompt=What is it?"]) == 0
    reader = SourceReader(tmp_path / "out")
    assert [reader[i].key for i in range(len(reader))] == ["a", "b"]
    assert reader[1].messages[0]["content"] == [{"type": "text", "text": "What is it?"}]
    assert reader[1].meta == {"row": 1}


def test_mistakes_are_named(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DataError, match=r"unknown format 'tvs': did you mean 'tsv'\? \(known: jsonl, tsv\)"):
        read_records(table, "tvs")
    with pytest.raises(DataError, match=r"unknown format 'spreadsheet': known: jsonl, tsv$"):
        read_records(table, "spreadsheet")
    with pytest.raises(DataError, match=r"suffix tells no format; name one with --format: jsonl, tsv"):
        read_records(table.with_suffix(".xls"))
    with pytest.raises(DataError, match=r"format 'tsv': .*'promt' \(its options: prompt\)"):
        read_records(table, promt="x")
    assert main(["data", "write", "out", "word", "--from", str(table)]) == 2
    assert "'word'" in capsys.readouterr().err
