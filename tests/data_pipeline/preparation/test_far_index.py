"""Shards in a bucket indexed by tasks on nodes that share nothing else: the files that one process makes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.preparation import far_index
from data_pipeline.preparation.engines import Local
from data_pipeline.preparation.index import Measuring
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.sources import measure_source
from tests.fixtures.buckets import Bucket
from tests.fixtures.command import Command
from tests.jobs import TINY


def test_tasks_on_three_nodes_and_the_one_that_finishes(
    bucket: Bucket,
    shard_folder: Path,
    encoder: Any,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tars = {path.name: path.read_bytes() for path in shard_folder.glob("*.tar")}
    for prefix in ("one", "many"):
        bucket.store.objects |= {f"bucket/{prefix}/{name}": data for name, data in tars.items()}
    bucket.store.times = dict.fromkeys(bucket.store.objects, time.time() - 5)
    index_shards("s3://bucket/one", num_processes=1)
    measure_source("s3://bucket/one", encoder, num_processes=1)
    url = "s3://bucket/many"
    late = ["--measure", str(TINY)]  # whose tokenizer is trained on shards that are indexed: not by a task
    for node, words in enumerate([["--task", "2", *late], ["--task", "0"]]):
        monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / f"node-{node}"))
        said = command("data", "index", url, "--tasks", "3", *words, "--processes", "1")
        assert f"did {2 if node == 0 else 3} shards; --finish comes" in said
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-2"))
    said = command("data", "index", url, "--finish", "--processes", "1", code=2)
    assert "s3://bucket/many: 3 of 8 shards are not done (000001.tar is the first)" in said
    job = far_index.open_job(url, [Measuring(encoder)])
    assert far_index.index_missing(job, task=1, tasks=3, engine=Local(1)) == 3
    bucket.store.log.clear()
    far_index.finish(job, num_processes=1)
    wide = [path for method, path in bucket.store.log if method == "GET" and path.endswith("000004.tar")]
    assert len(wide) <= 40  # texts of the samples, not the shard once more
    one, many = (
        {
            name.removeprefix(f"bucket/{prefix}/"): data
            for name, data in bucket.store.objects.items()
            if name.startswith(f"bucket/{prefix}/") and not name.endswith("etags.json")
        }
        for prefix in ("one", "many")
    )
    one["manifest.json"] = one["manifest.json"].replace(b'"source": "one"', b'"source": "many"')
    assert one == many
    again = far_index.open_job(url)
    assert far_index.index_missing(again, engine=Local(1)) == 0


def test_what_the_tasks_measured_is_joined_and_no_sample_is_read_again(
    bucket: Bucket, shard_folder: Path, encoder: Any
) -> None:
    tars = {path.name: path.read_bytes() for path in shard_folder.glob("*.tar")}
    for prefix in ("one", "many"):
        bucket.store.objects |= {f"bucket/{prefix}/{name}": data for name, data in tars.items()}
    index_shards("s3://bucket/one", num_processes=1)
    measure_source("s3://bucket/one", encoder, num_processes=1)
    job = far_index.open_job("s3://bucket/many", [Measuring(encoder)])
    assert [far_index.index_missing(job, task=task, tasks=3, engine=Local(1)) for task in range(3)] == [3, 3, 2]
    lengths = {name: data for name, data in bucket.store.objects.items() if ".lengths-" in name}
    assert len(lengths) == 8
    bucket.store.log.clear()
    far_index.finish(job, num_processes=1)
    assert bucket.requests("GET", ".tar") == 0
    bucket.store.objects |= lengths  # as when it had been killed before it deleted them
    far_index.finish(job, num_processes=1)
    one, many = (
        {
            name.split("/")[-1]: data
            for name, data in bucket.store.objects.items()
            if name.startswith(f"bucket/{prefix}")
        }
        for prefix in ("one", "many")
    )
    assert one.keys() == many.keys()
    (measures,) = (name for name in one if name.startswith("measures-") and name.endswith(".npy"))
    assert one[measures] == many[measures]
    assert sum(name.endswith(".bad.jsonl") and one[name] == many[name] for name in one) == sum(
        name.endswith(".bad.jsonl") for name in one
    )
