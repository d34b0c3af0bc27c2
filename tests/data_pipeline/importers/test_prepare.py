"""Preparing folders: generated once, indexed when foreign, refused when made otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.prepare import FolderSpec, prepare_folders, write_generated
from data_pipeline.shards.reader import SourceReader


def test_generated_sources_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, records: Any) -> None:
    calls = []

    def fake(name: str, **args: Any) -> Any:
        calls.append(name)
        return records(args["num_samples"])

    monkeypatch.setattr("data_pipeline.generators.generate", fake)
    (tmp_path / "g.partial").mkdir()
    (tmp_path / "g.partial" / "000000.tar").write_text("left by a crash")
    for _ in range(2):
        manifest = write_generated("g", tmp_path / "g", "letters", {"num_samples": 5})
    assert calls == ["letters"]
    assert manifest.num_samples == 5
    assert not (tmp_path / "g.partial").exists()
    with pytest.raises(DataError, match="was made with"):
        write_generated("g", tmp_path / "g", "letters", {"num_samples": 6})
    specs = [FolderSpec(name, str(tmp_path / name), "letters", {"num_samples": 4}) for name in ("h", "i")]
    prepare_folders([*specs, FolderSpec("g", str(tmp_path / "g"))])
    assert len(SourceReader(tmp_path / "i")) == 4
    with pytest.raises(DataError, match="no tar shards"):
        prepare_folders([FolderSpec("j", str(tmp_path / "j"))])
