"""Whole shards on a node's disk: each once, ahead of the plan, within a budget, whatever ends in the middle."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import UnreachableError
from data_pipeline.loading import whole as whole_shards
from data_pipeline.loading.loader import build_loader
from data_pipeline.loading.read_mode import choose
from data_pipeline.loading.traffic import describe, traffic
from data_pipeline.loading.whole import WholeShards
from data_pipeline.order.plan import Plan
from data_pipeline.order.settings import PlanSettings
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.sources import Source, measure_source, open_source
from data_pipeline.stores import helper, requests
from data_pipeline.stores.folders import node_folder
from data_pipeline.stores.node_cache import fetched
from data_pipeline.stores.object_storage import ObjectStorage
from data_pipeline.stores.shard_cache import Fetched, ShardCache, root
from tests.data_pipeline.loading.test_loader import same
from tests.fixtures.buckets import Bucket
from tests.waiting import until

SETTINGS = PlanSettings(sequence_length=120, global_batch_packs=8, window_shards=2, mix_block=32, pack_window=100)
SHARDS = {"letters": "shards"}


def plan_of(source: Source, **settings: Any) -> Plan:
    return Plan({"letters": source}, {"letters": 1.0}, replace(SETTINGS, seed=3, **settings))


@pytest.fixture
def far(bucket: Bucket, shard_folder: Path, encoder: Any) -> Source:
    """The letters, in the bucket."""
    url = bucket.upload(shard_folder, "letters")
    index_shards(url, num_processes=1)
    measure_source(url, encoder, num_processes=1)
    source = open_source("letters", url, encoder)
    bucket.store.log.clear()
    return source


def tars() -> list[str]:
    return sorted(path.name for path in root().rglob("*.tar*"))


def shard_sizes(source: Source) -> list[int]:
    return [shard.size for shard in source.reader.manifest.shards]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 5])
def test_batches_are_those_from_disk_and_each_shard_comes_once(
    bucket: Bucket, far: Source, source: Source, encoder: Any, workers: int, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNVLM_READ_TIMEOUT", "10")  # a read that took too long would be a second one
    kwargs = {"num_workers": workers, "start_step": start}
    steps = list(build_loader(plan_of(far, epochs=2), encoder, reads=SHARDS, cache_bytes=10**9, **kwargs))
    reference = list(build_loader(plan_of(source, epochs=2), encoder, **kwargs))
    assert len(steps) == len(reference) > 0
    assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
    shards = len(shard_sizes(far))
    assert [bucket.requests("GET", f"{number:06d}.tar") for number in range(shards)] == [1] * shards


def test_what_is_passed_is_deleted_and_the_budget_holds(
    bucket: Bucket, far: Source, source: Source, encoder: Any
) -> None:
    plan, sizes = plan_of(far, pack_window=40, window_shards=1, epochs=2), shard_sizes(far)
    limit = 5 * max(sizes)
    taken, steps = [], []
    for step in build_loader(plan, encoder, num_workers=0, reads=SHARDS, cache_bytes=limit):
        steps.append(step)
        taken.append(sum(path.stat().st_size for path in root().rglob("*.tar")))
    assert 0 < max(taken) <= limit < sum(sizes)
    reference = list(build_loader(plan_of(source, pack_window=40, window_shards=1, epochs=2), encoder, num_workers=0))
    assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
    whole = WholeShards(plan, SHARDS, limit)
    for step in range(plan.num_steps + 1):
        whole.passed(step)
    assert not [name for name in tars() if name.endswith(".tar")]


def test_what_has_no_room_is_read_by_ranges(
    bucket: Bucket, far: Source, source: Source, encoder: Any, caplog: pytest.LogCaptureFixture
) -> None:
    loader = build_loader(plan_of(far), encoder, num_workers=0, reads=SHARDS, cache_bytes=2 * max(shard_sizes(far)))
    steps, reference = list(loader), list(build_loader(plan_of(source), encoder, num_workers=0))
    assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
    assert "no room for" in caplog.text


def test_a_disk_that_fails_once_does_not_end_fetching_ahead(
    bucket: Bucket, far: Source, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, original, failures = plan_of(far), ShardCache.fetch, [OSError(28, "No space left on device")]

    def fetch(self: ShardCache, name: str, wanted: Any, wait: bool) -> Fetched:
        if failures:
            raise failures.pop()
        return original(self, name, wanted, wait)

    monkeypatch.setattr(ShardCache, "fetch", fetch)
    whole = WholeShards(plan, SHARDS, 10**9)
    whole.begin(0, np.zeros((0, 2), np.int64))
    until(lambda: not whole._fetching)
    assert len([name for name in tars() if name.endswith(".tar")]) == len(shard_sizes(far)) - 1


def test_large_shards_share_the_connections_of_a_process(
    bucket: Bucket, far: Source, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They came one by one: the first batch, whose samples lie in many of them, waited for each in its turn."""
    monkeypatch.setattr(requests, "DOWNLOAD_BYTES", max(shard_sizes(far)) // 3 + 1)  # three parts
    monkeypatch.setattr(whole_shards, "CONNECTIONS", 7)
    monkeypatch.setenv("ALIGNVLM_READ_TIMEOUT", "10")  # as above
    bucket.faults.latency = 0.3
    loader = build_loader(plan_of(far), encoder, num_workers=1, reads=SHARDS, cache_bytes=10**9)
    assert len(list(loader)) > 0
    assert 7 <= bucket.faults.counts["at once"] <= 9
    assert bucket.requests("GET", ".tar") <= 3 * len(shard_sizes(far))


def download(plan: Plan, wait: bool, results: Any) -> None:
    """In a process of its own: fetch the first shard."""
    whole = WholeShards(plan, SHARDS, 10**9)
    name = plan.sources["letters"].reader.manifest.shards[0].name  # type: ignore[attr-defined]
    results.put(whole.caches[0].fetch(name, lambda path: True, wait))


def test_killed_in_a_download_the_next_start_is_clean(
    bucket: Bucket, far: Source, source: Source, encoder: Any
) -> None:
    plan, context = plan_of(far), multiprocessing.get_context("fork")
    results = context.Queue()
    bucket.faults.stall = 1.0
    os.environ["ALIGNVLM_READ_TIMEOUT"] = "30"
    first = context.Process(target=download, args=(plan, True, results))
    first.start()
    began = time.monotonic()
    while bucket.faults.counts["stall"] == 0 and time.monotonic() - began < 20:
        time.sleep(0.02)
    bucket.faults.stall = 0.0
    second = context.Process(target=download, args=(plan, False, results))
    second.start()
    assert results.get(timeout=20) is Fetched.ELSEWHERE
    third = context.Process(target=download, args=(plan, True, results))  # waits for the first
    third.start()
    time.sleep(0.2)
    assert tars() == ["000000.tar.partial"]
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    assert results.get(timeout=20) is Fetched.HERE
    for process in (first, second, third):
        process.join(10)
    assert tars() == ["000000.tar"]
    (root() / "left").mkdir()
    (root() / "left" / "other.tar.partial").write_bytes(bytes(3000))  # of a run with other data
    helper.stop()
    limit = sum(shard_sizes(far))
    steps = list(build_loader(plan, encoder, num_workers=1, reads=SHARDS, cache_bytes=limit))
    reference = list(build_loader(plan_of(source), encoder, num_workers=0))
    assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
    assert tars() == [f"{number:06d}.tar" for number in range(len(shard_sizes(far)))]


@pytest.mark.parametrize("what", ["shard", "index"])
def test_who_waits_for_one_that_gives_a_store_up_gives_it_up_too(
    bucket: Bucket, far: Source, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Otherwise the processes of a node would lose patience one after the other."""
    monkeypatch.setenv("ALIGNVLM_PATIENCE", "1")
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    helper.stop()
    bucket.faults.counts.clear()
    bucket.faults.down = True
    storage = far.reader.storage
    assert isinstance(storage, ObjectStorage)
    cache, index = ShardCache(storage, far.fingerprint, 10**9), node_folder(storage.url) / "new.index.jsonl"
    asks = {
        "shard": lambda: cache.fetch("000000.tar", lambda path: False, wait=True),
        "index": lambda: fetched(storage, index.name, index),
    }

    def ask(_: int) -> None:
        with pytest.raises(UnreachableError, match=r"no answer for \d s; the same command goes on when"):
            asks[what]()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(ask, range(4)))
    assert bucket.faults.counts["reset"] <= 3
    bucket.faults.down = False
    assert asks["shard"]() is Fetched.HERE


def test_auto_weighs_requests_against_bytes(far: Source) -> None:
    plan, size = plan_of(far), sum(shard_sizes(far))
    one = choose(plan, {}, nodes=1, cache_bytes=10 * size)["letters"]
    assert one.mode == "shards"
    assert "instead of 300 requests" in one.reason
    assert choose(plan, {}, nodes=1000, cache_bytes=10 * size)["letters"].mode == "ranges"
    assert "do not hold" in choose(plan, {}, nodes=1, cache_bytes=size // 2)["letters"].reason
    assert str(choose(plan, {"letters": "ranges"}, 1, size)["letters"]) == "ranges (as the recipe says)"
    few = choose(plan_of(far, max_steps=1), {}, nodes=1, cache_bytes=10 * size)["letters"]
    assert few.mode == "shards"  # small samples: a request weighs more than these shards
    asked = traffic(plan, 2, 8, 8, 2.0, cache_bytes=10 * size)
    assert asked is not None
    assert "letters: read by shards (" in describe(asked)
    assert asked["bytes_per_step"] * plan.num_steps == pytest.approx(size)
