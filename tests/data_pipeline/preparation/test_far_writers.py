"""Several processes or nodes that write or plan one folder of a bucket at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.preparation.target import open_target
from data_pipeline.shards import writer
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.writer import write_shards
from data_pipeline.stores import helper
from data_pipeline.stores.requests import Put, Upload
from tests.data_pipeline.preparation.test_far_write import inside
from tests.fixtures.buckets import Bucket
from tests.stores.servers import Answer


def test_two_who_write_one_folder_lose_nothing(
    bucket: Bucket, records: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, locked, submit = "s3://bucket/mine", writer.locked, helper.submit
    started: list[int] = []

    def meet(*args: Any) -> Any:
        if not started:
            started.append(1)
            write_shards(records(20), url, samples_per_shard=10, num_processes=1)
        return locked(*args)

    monkeypatch.setattr(writer, "locked", meet)  # on one node, where the second waits
    with pytest.raises(DataError, match="is not empty"):
        write_shards(records(30), url, samples_per_shard=10, num_processes=1)
    assert SourceReader(url)[19].key == "s00019"

    def overtaken(request: Any) -> Future[Any]:
        if isinstance(request, Upload):
            submit(Put(request.url, "etags.json", b'{"manifest": "of another node"}')).result()
        return submit(request)

    monkeypatch.setattr(helper, "submit", overtaken)
    with pytest.raises(DataError, match="another process writes other shards here"):
        write_shards(records(20), f"{url}-too", samples_per_shard=10, num_processes=1)
    assert "manifest.json" not in inside(bucket, "mine-too")


def test_of_two_nodes_that_write_one_folder_the_first_is_not_disturbed(
    bucket: Bucket, records: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cache = "s3://bucket/mine", os.environ["ALIGNVLM_CACHE"]

    def meanwhile() -> Iterator[dict[str, Any]]:
        yield from records(30)
        monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "another-node"))
        write_shards(records(20), url, samples_per_shard=10, num_processes=1)
        monkeypatch.setenv("ALIGNVLM_CACHE", cache)

    with pytest.raises(DataError, match="another process writes other shards here; choose another folder"):
        write_shards(meanwhile(), url, samples_per_shard=10, num_processes=1)
    assert len(SourceReader(url)) == 20
    assert SourceReader(url)[19].key == "s00019"


def test_a_folder_whose_first_shard_comes_meanwhile_and_one_whose_mark_goes(bucket: Bucket, records: Any) -> None:
    def meanwhile() -> Iterator[dict[str, Any]]:
        yield from records(20)
        bucket.store.objects["bucket/begun/000000.tar"] = b"of another node"
        bucket.store.objects.pop("bucket/mine/etags.json", None)  # by a process beside this one that failed

    mark = bucket.store.objects["bucket/begun/etags.json"] = b'{"manifest": "of another node"}'
    with pytest.raises(DataError, match="another process writes other shards here; choose another folder"):
        write_shards(meanwhile(), "s3://bucket/begun", samples_per_shard=10, num_processes=1)
    assert bucket.store.objects["bucket/begun/etags.json"] == mark
    write_shards(meanwhile(), "s3://bucket/mine", samples_per_shard=10, num_processes=1)
    assert len(SourceReader("s3://bucket/mine")) == 20


def test_of_two_nodes_that_plan_one_folder_the_first_is_followed(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = bucket.store.answer

    def refuse(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        return (501, {}, b"") if "if-none-match" in headers else answer(method, target, headers, body)

    target = open_target("s3://bucket/planned")
    target.create("write-plan.json", b"mine")
    target.create("write-plan.json", b"of another node")
    assert target.read("write-plan.json") == b"mine"
    bucket.store.preconditions = False  # as some stores are: the last one counts
    target.create("write-plan.json", b"of another node")
    assert target.read("write-plan.json") == b"of another node"
    monkeypatch.setattr(bucket.store, "answer", refuse)  # as others are
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    helper.stop()
    target.create("write-plan.json", b"mine again")
    assert target.read("write-plan.json") == b"mine again"
    monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")  # who knows it of his store says so to its client
    helper.stop()
    target.create("write-plan.json", b"without conditions")
    assert target.read("write-plan.json") == b"without conditions"
