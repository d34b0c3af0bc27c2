"""Two folders share a shard when its samples are the same, whatever it is called."""

from __future__ import annotations

import shutil
from pathlib import Path

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


def test_folders_without_an_index_are_passed_over(tmp_path: Path) -> None:
    assert common_shard(make(tmp_path / "train", "one"), tmp_path / "none") is None
