"""Writing: shards that webdataset reads, the same bytes for the same records, invalid records refused."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import webdataset

from data_pipeline.errors import DataError
from data_pipeline.samples.schema import normalise_messages
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.writer import write_shards


def test_round_trip(reader: SourceReader, records: Any) -> None:
    assert len(reader) == 300
    for i, record in enumerate(records(300)):
        sample = reader[i]
        assert sample.key == record["key"]
        assert sample.meta == {"task": "count"}
        assert sample.messages == normalise_messages(record["messages"], len(record["images"]))
        assert [image.tobytes() for image in sample.images] == [image.tobytes() for image in record["images"]]
    _, sizes, meta = reader.record(2)
    assert sizes == [(12, 12), (12, 12)]
    assert meta["task"] == "count"
    assert len(list(reader.messages())) == 300


def test_a_plain_webdataset_pipeline_reads_the_shards(shard_folder: Path) -> None:
    urls = sorted(str(path) for path in shard_folder.glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in samples] == [f"s{i:05d}" for i in range(300)]
    assert samples[1]["json"]["task"] == "count"
    assert samples[1]["0.png"].size == (11, 12)


def test_the_same_records_have_the_same_fingerprint(records: Any, tmp_path: Path) -> None:
    prints = [write_shards(records(30), tmp_path / name, source="s").fingerprint for name in ("a", "b")]
    other = write_shards(records(31), tmp_path / "c", source="s").fingerprint
    assert prints[0] == prints[1] != other


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"key": "a.b", "messages": [{"role": "user", "content": "x"}]}, "does not fit"),
        ({"key": "../a", "messages": [{"role": "user", "content": "x"}]}, "does not fit"),
        ({"key": "a\0b", "messages": [{"role": "user", "content": "x"}]}, "does not fit"),
        ({"key": "\ud800", "messages": [{"role": "user", "content": "x"}]}, "does not fit"),
        ({"key": "a/__b__", "messages": [{"role": "user", "content": "x"}]}, "does not fit"),
        ({"key": "__a__/b", "messages": [{"role": "user", "content": "x"}]}, "does not fit"),
        ({"key": "a", "messages": [{"role": "user", "content": "x"}] * 1001}, "1,001 messages; at most 1,000"),
        ({"key": "a", "messages": []}, "not a list"),
        ({"key": "a", "messages": [{"role": "user", "content": "x"}], "json": 1}, "field may not be called 'json'"),
        ({"key": "a", "messages": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"key": "a", "messages": [{"role": "user", "content": "<image>"}]}, "1 image placeholder"),
        ({"key": "a", "messages": [{"role": "user", "content": "<image>"}], "images": [b"text"]}, "not an image"),
        ({"key": "a", "messages": [{"role": "user", "content": [{"type": "video"}]}]}, "neither an image nor a text"),
        ({"key": "a", "messages": [{"role": "user", "content": "é" * 3_000_000}]}, r"18,\d{3},\d{3} bytes; at most"),
    ],
)
def test_invalid_records_are_refused_and_leave_nothing(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        write_shards([record], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_writing_twice_or_over_something_is_refused(tmp_path: Path, records: Any) -> None:
    with pytest.raises(DataError, match="comes twice"):
        write_shards([*records(3), *records(1)], tmp_path / "out")
    write_shards(records(3), tmp_path / "out", num_processes=1)
    with pytest.raises(DataError, match="not empty"):
        write_shards(records(3), tmp_path / "out")


def test_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    """The bytes of a small shard reach the disk only when its file is closed."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DataError, match=r"full\.partial cannot be written \(File too large\); choose a folder"):
            write_shards(
                [{"key": "a", "messages": [{"role": "user", "content": "a"}]}], tmp_path / "full", num_processes=1
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
