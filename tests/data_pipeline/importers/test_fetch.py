"""Shards that commands print: only when allowed, whole or not there, and not fetched twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from alignvlm.cli import main
from data_pipeline.errors import DataError
from data_pipeline.importers.fetch import fetch_shards
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.writer import write_shards


@pytest.fixture
def shards(tmp_path: Path, records: Any) -> Path:
    folder = tmp_path / "far away"
    write_shards(records(50), folder, samples_per_shard=20, num_processes=1)
    return folder


def test_commands_run_only_when_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "fetch", f"pipe:touch {tmp_path}/ran", str(tmp_path / "here")]) != 0
    assert "--allow-pipe" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
    with pytest.raises(DataError, match="no pipe: URL"):
        fetch_shards("https://host/0.tar", tmp_path / "here", allow_pipe=True)


def test_fetched_shards_are_those_of_the_other_side(shards: Path, tmp_path: Path) -> None:
    url, here = f"pipe:cat '{shards}'/{{000000..000002}}.tar", tmp_path / "here"
    assert main(["data", "fetch", url, str(here), "--allow-pipe"]) == 0
    theirs, ours = SourceReader(shards), SourceReader(here)
    assert len(ours) == 50
    assert [shard.sha256 for shard in ours.manifest.shards] == [shard.sha256 for shard in theirs.manifest.shards]
    assert ours[33].messages == theirs[33].messages


def test_a_failing_command_leaves_the_shards_before_it_and_is_taken_up_again(shards: Path, tmp_path: Path) -> None:
    url, here = f"pipe:cat '{shards}'/{{000000..000002}}.tar && echo run >> {tmp_path}/log", tmp_path / "here"
    away = shards / "000001.tar"
    away.rename(shards / "hidden")
    with pytest.raises(DataError, match=r"000001\.tar.*exited with 1 .*No such file.*run it again"):
        fetch_shards(url, here, allow_pipe=True)
    assert sorted(path.name for path in here.iterdir()) == ["000000.tar", "fetched-from.txt"]
    (shards / "hidden").rename(away)
    assert fetch_shards(url, here, allow_pipe=True).num_samples == 50
    assert (tmp_path / "log").read_text() == "run\n" * 3  # each shard once
    with pytest.raises(DataError, match="was not fetched from"):
        fetch_shards("pipe:true", here, allow_pipe=True)


def test_a_command_that_prints_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`true` printed nothing"):
        fetch_shards("pipe:true", tmp_path / "here", allow_pipe=True)
