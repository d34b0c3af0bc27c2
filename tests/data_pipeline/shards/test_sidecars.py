"""Folders that cannot be written: index and sample lengths lie in a cache folder that every process finds."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.prepare import prepare_folder
from data_pipeline.shards import sidecars
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sources import measure_source, open_source
from data_pipeline.shards.verify import verify_folder
from data_pipeline.shards.writer import write_shards


@pytest.fixture
def shards(tmp_path: Path, records: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards without an index in a folder that cannot be written, not even by root."""
    folder = tmp_path / "mounted" / "web"
    write_shards(records(6), folder, samples_per_shard=3, num_processes=1)
    for path in [*folder.glob("*.jsonl"), folder / "manifest.json"]:
        path.unlink()
    refuse(folder, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


def refuse(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing below `folder` fails from now on."""
    opened = os.open

    def refusing(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and Path(os.fspath(path)).is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", refusing)


def test_index_and_lengths_of_read_only_shards_go_to_the_cache(
    shards: Path, tmp_path: Path, encoder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    before = sorted(shards.iterdir())
    manifest = prepare_folder("web", shards, num_processes=1)
    measure_source(shards, encoder, num_processes=1)
    assert sorted(shards.iterdir()) == before
    (cache,) = (tmp_path / "cache" / "alignvlm" / "shards").iterdir()
    assert caplog.messages == [f"{shards} cannot be written: its index and sample lengths are kept in {cache}"]
    assert {path.name for path in cache.iterdir() if path.suffix == ".json"} == {"manifest.json"}

    source = open_source("web", shards, encoder)
    assert [source.reader[number].key for number in range(6)] == [f"s{number:05d}" for number in range(6)]
    assert source.measures[:, 0].all()
    assert verify_folder(shards, decode=True, num_processes=1) == []
    assert prepare_folder("web", shards, num_processes=1) == manifest  # nothing is indexed again
    assert len(caplog.messages) == 1


def test_the_cache_is_looked_for_once_not_for_every_shard(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_shards(shards, num_processes=1)
    reader = SourceReader(shards)
    monkeypatch.setattr(sidecars, "_content", None)  # it lists all shards
    assert [reader[number].key for number in range(6)] == [f"s{number:05d}" for number in range(6)]


def test_other_shards_at_the_same_path_have_another_cache(shards: Path, tmp_path: Path, records: Any) -> None:
    index_shards(shards, num_processes=1)
    write_shards(records(9), tmp_path / "other", num_processes=1)
    os.rename(shards, tmp_path / "unmounted")
    shards.mkdir()
    os.rename(tmp_path / "other" / "000000.tar", shards / "000000.tar")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        SourceReader(shards)
    assert prepare_folder("web", shards, num_processes=1).num_samples == 9


def test_without_a_home_the_cache_lies_among_the_temporary_files(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    index_shards(shards, num_processes=1)
    assert len(SourceReader(shards)) == 6
    mine = tmp_path / f"alignvlm-{os.getuid()}"
    assert list((mine / "shards").iterdir())
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    os.rename(mine, tmp_path / "alignvlm-12345")  # a folder that another user put there
    with pytest.raises(DataError, match=r"no manifest\.json"):
        SourceReader(shards)
    with pytest.raises(DataError, match="let XDG_CACHE_HOME name a folder that can"):
        index_shards(shards, num_processes=1)


def test_indexed_shards_that_cannot_be_written_keep_their_index(
    tmp_path: Path, records: Any, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "web"
    manifest = write_shards(records(6), folder, num_processes=1)
    refuse(folder, monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert measure_source(folder, encoder, num_processes=1).is_relative_to(tmp_path / "cache")
    assert len(open_source("web", folder, encoder)) == 6
    assert index_shards(folder, num_processes=1).fingerprint == manifest.fingerprint
    (folder / "000000.tar").rename(folder / "000001.tar")
    with pytest.raises(DataError, match=r"manifest\.json does not fit the shards and cannot be written"):
        index_shards(folder, num_processes=1)
