"""Reading ahead: how many at a time, how much, in which order; neighbours are one request, slow ones get a second."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from data_pipeline.stores.fetch_ahead import FetchAhead, Range, reads_in_flight
from data_pipeline.stores.object_storage import ObjectStorage
from tests.fixtures.buckets import Bucket

DATA = bytes(range(256)) * 4096


@pytest.fixture
def storage(bucket: Bucket) -> ObjectStorage:
    for name in ("a", "b"):
        bucket.store.objects[f"bucket/far/{name}"] = DATA
    return ObjectStorage("s3://bucket/far")


def spread(storage: ObjectStorage, count: int, size: int = 100, step: int = 20_000) -> list[Range]:
    return [Range(storage, "a", number * step, number * step + size) for number in range(count)]


def test_reads_fly_together_and_come_back_in_order(bucket: Bucket, storage: ObjectStorage) -> None:
    bucket.faults.latency = 0.2
    fetch, ranges = FetchAhead(in_flight=16), spread(storage, 32)
    began = time.monotonic()
    fetch.foresee(fetch.expect(ranges[:8]), ranges[:8], ranges[8:])
    assert [fetch.take(each) for each in ranges] == [DATA[each.begin : each.end] for each in ranges]
    assert 0.4 < time.monotonic() - began < 2.5  # two rounds of sixteen; one at a time would take 6.4 s
    assert bucket.requests("GET") == 32


def test_neighbours_are_one_request(bucket: Bucket, storage: ObjectStorage) -> None:
    close = [Range(storage, "b", n * 3000, n * 3000 + 2500) for n in (5, 0, 3, 1, 4, 2)]
    fetch = FetchAhead(in_flight=4)
    fetch.expect([*close, *spread(storage, 2)])
    assert [fetch.take(each) for each in close] == [DATA[each.begin : each.end] for each in close]
    assert [fetch.take(each) for each in spread(storage, 2)] == [DATA[:100], DATA[20_000:20_100]]
    assert bucket.requests("GET", "far/b") == 1
    assert bucket.requests("GET", "far/a") == 2
    assert fetch.num_bytes == 5 * 3000 + 2500 + 200


def test_bytes_ahead_are_bounded_and_what_is_not_wanted_is_dropped(bucket: Bucket, storage: ObjectStorage) -> None:
    fetch, ranges = FetchAhead(in_flight=32, ahead_bytes=5_000), spread(storage, 12, size=1_000)
    fetch.foresee(fetch.expect(ranges[:1]), ranges[:1], ranges[1:])
    assert fetch.num_requests == 5
    others = [Range(storage, "b", each.begin, each.end) for each in ranges]
    stale = fetch.expect(others[:1]) - 1
    fetch.foresee(stale, [], ranges)  # a forecast of an item that is over
    fetch.foresee(stale + 1, others[:1], others[1:])
    assert [fetch.take(each) for each in others] == [DATA[each.begin : each.end] for each in others]
    assert fetch.take(ranges[11]) == DATA[ranges[11].begin : ranges[11].end]  # not foreseen: read at once
    assert fetch.num_requests == 5 + 12 + 1
    assert fetch._held == 0


@pytest.mark.parametrize(("processes", "reads"), [(1, 96), (4, 64), (16, 16), (64, 8), (256, 8)])
def test_processes_of_a_node_share_the_reads(processes: int, reads: int) -> None:
    assert reads_in_flight(processes) == reads


def test_one_retry_of_a_damaged_answer(bucket: Bucket, shard_folder: Path) -> None:
    """Bytes that change on the way are read once more, past what was read ahead."""
    from data_pipeline.shards.index import index_shards
    from data_pipeline.shards.reader import SourceReader

    url = bucket.upload(shard_folder, "letters")
    index_shards(url, num_processes=1)
    reader = SourceReader(url)
    entry = reader.entry(7)
    whole = reader.read(entry)
    assert reader.read(entry, lambda name, offset, size: bytes(size)) == whole
