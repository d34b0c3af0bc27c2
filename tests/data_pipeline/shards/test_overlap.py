"""Two folders share a shard when its samples are the same, whatever it is called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data_pipeline.shards import overlap
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.overlap import common_shard
from data_pipeline.shards.writer import write_shards


def make(folder: Path, answer: str) -> Path:
    turns = [{"role": "user", "content": "one or two?"}, {"role": "assistant", "content": answer}]
    write_shards([{"key": str(number), "messages": turns} for number in range(3)], folder, source=folder.name)
    return folder


def test_a_copied_shard_is_found_under_another_name(tmp_path: Path) -> None:
    train, held_out = make(tmp_path / "train", "one"), make(tmp_path / "held_out", "two")
    assert common_shard(train, held_out) is None
    (shard,) = train.glob("*.tar")
    shutil.copy(shard, held_out / "renamed.tar")
    index_shards(held_out)
    assert common_shard(held_out, train) == ("renamed.tar", shard.name)


def test_every_index_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = make(tmp_path / "train", "one"), make(tmp_path / "held_out", "two")
    for folder in folders:
        (shard,) = folder.glob("*.tar")
        for number in range(4):
            shutil.copy(shard, folder / f"copy{number}.tar")
        (folder / "empty.tar").write_bytes(bytes(10240))  # no samples in common
        index_shards(folder)
    read = []
    monkeypatch.setattr(overlap, "content_digest", lambda place, name: read.append(name) or f"{place.url}/{name}")
    assert common_shard(*folders) is None
    assert len(read) == 10


def test_folders_without_an_index_are_passed_over(tmp_path: Path) -> None:
    assert common_shard(make(tmp_path / "train", "one"), tmp_path / "none") is None
