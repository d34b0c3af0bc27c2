"""Shards copied from a bucket: those of the other side, each once, and never mixed with others."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from alignvlm.cli import main
from data_pipeline.errors import DataError, LoadError
from data_pipeline.importers.fetch import fetch_shards
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import SourceReader
from data_pipeline.stores.object_storage import ObjectStorage
from tests.fixtures.buckets import Bucket


def test_fetched_shards_are_those_of_the_other_side(bucket: Bucket, shard_folder: Path, tmp_path: Path) -> None:
    url, here = bucket.upload(shard_folder, "letters"), tmp_path / "here"
    assert main(["data", "fetch", url, str(here)]) == 0
    theirs, ours = SourceReader(shard_folder), SourceReader(here)
    assert ours.fingerprint == theirs.fingerprint
    assert ours[33].messages == theirs[33].messages
    bucket.store.log.clear()
    (here / "000002.tar").unlink()
    assert main(["data", "fetch", url, str(here)]) == 0
    assert bucket.requests("GET", ".tar") == bucket.requests("GET", "000002.tar") == 1
    assert bucket.requests("LIST") == bucket.requests("HEAD") == 1
    with pytest.raises(DataError, match="was not fetched from"):
        fetch_shards(bucket.upload(shard_folder, "other"), here)


def test_two_calls_for_one_folder_copy_each_shard_once(
    bucket: Bucket, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, here, copy = bucket.upload(shard_folder, "letters"), tmp_path / "here", ObjectStorage.download
    with ThreadPoolExecutor(1) as thread:
        second: list[Future[Manifest]] = []

        def meet(*arguments: Any) -> None:
            if not second:
                second.append(thread.submit(fetch_shards, url, here))
                time.sleep(0.2)
            copy(*arguments)

        monkeypatch.setattr(ObjectStorage, "download", meet)
        first = fetch_shards(url, here)
        assert second[0].result() == first
    assert bucket.requests("GET", ".tar") == len(first.shards)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_was_replaced_by_one_of_equal_size_is_fetched_again(
    bucket: Bucket, shard_folder: Path, tmp_path: Path, indexed: bool
) -> None:
    url, here = bucket.upload(shard_folder, "letters"), tmp_path / "here"
    tars = {name: data for name, data in bucket.store.objects.items() if name.endswith(".tar")}
    bucket.store.objects = tars
    if indexed:
        index_shards(url, num_processes=1)
    fetch_shards(url, here)
    name = "bucket/letters/000002.tar"
    tars[name] = tars[name].replace(b"number 90", b"number 00")
    if indexed:
        index_shards(url, num_processes=1)
    bucket.store.log.clear()
    fetch_shards(url, here)
    assert bucket.requests("GET", ".tar") == bucket.requests("GET", "000002.tar") == 1
    assert (here / "000002.tar").read_bytes() == tars[name]


@pytest.mark.parametrize("place", [10, 700])
def test_a_copy_that_was_changed_is_fetched_again(
    bucket: Bucket, shard_folder: Path, tmp_path: Path, place: int
) -> None:
    """In a header, where it would be no archive, and in a member."""
    url, here = bucket.upload(shard_folder, "letters"), tmp_path / "here"
    made, copy = fetch_shards(url, here), here / "000001.tar"
    whole = copy.read_bytes()
    copy.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    bucket.store.log.clear()
    assert fetch_shards(url, here) == made
    assert bucket.requests("GET", ".tar") == bucket.requests("GET", "000001.tar") == 1
    assert copy.read_bytes() == whole


def test_what_is_not_there_or_was_replaced_is_named(bucket: Bucket, shard_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"s3://bucket/none: no \.tar shards here"):
        fetch_shards("s3://bucket/none", tmp_path / "here")
    url = bucket.upload(shard_folder, "letters")
    index_shards(url, num_processes=1)
    shards = bucket.store.objects
    shards["bucket/letters/000000.tar"] = shards["bucket/letters/000001.tar"]
    with pytest.raises(DataError, match=r"letters/000000\.tar has 92,160 bytes, and 81,920 in manifest\.json there"):
        fetch_shards(url, tmp_path / "here")
    shards["bucket/letters/000000.tar"] = shards["bucket/letters/000003.tar"]
    with pytest.raises(DataError, match=r"here/000000\.tar is not what s3://bucket/letters/manifest\.json lists"):
        fetch_shards(url, tmp_path / "here")
    with pytest.raises(LoadError, match="replaced"):
        SourceReader(url)[0]
