"""Reads of samples by threads: the bytes whatever goes wrong, a second request for what is late, and few of those."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.errors import DataError, LoadError
from data_pipeline.stores import engine
from data_pipeline.stores.failures import MissingObjectError, ReplacedError
from data_pipeline.stores.remote import ObjectInfo
from data_pipeline.stores.requests import Get
from data_pipeline.stores.waiting import late, patience
from tests.fixtures.buckets import Bucket

DATA = bytes(range(256)) * 4096
URL = "s3://bucket/far"
RANGES = [(number * 9_000, number * 9_000 + 100 + 80 * number) for number in range(80)] + [(100, len(DATA))]


@pytest.fixture
def store(bucket: Bucket) -> Bucket:
    bucket.store.objects["bucket/far/a b.tar"] = DATA
    return bucket


def in_worker(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process that makes requests itself, as loader processes do."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=lambda: results.put(function(*arguments)))
    process.start()
    result = results.get(timeout=60)
    process.join(20)
    assert process.exitcode == 0
    return result


def read(ranges: list[tuple[int, int]], etag: str = "", at_once: int = 16, name: str = "a b.tar") -> Any:
    """What each read gave, seconds of the slowest round, requests that were second ones."""
    found, slowest = list[Any](), 0.0
    for first in range(0, len(ranges), at_once):
        began = time.monotonic()
        gets = [Get(URL, name, *each, etag, len(DATA), hedged=True) for each in ranges[first : first + at_once]]
        for future in [late.submit(get) for get in gets]:
            try:
                found.append(bytes(future.result()[0]))
            except DataError as error:
                found.append(error)
        slowest = max(slowest, time.monotonic() - began)
    assert late._reads is not None
    return found, slowest, late._reads.latencies.num_hedges


def wanted(ranges: list[tuple[int, int]]) -> list[bytes]:
    return [DATA[begin:end] for begin, end in ranges]


def test_ranges_are_read_at_the_same_time_once_each(store: Bucket) -> None:
    store.faults.latency = 0.2
    found, slowest, _ = in_worker(read, RANGES, store.etag("far/a%20b.tar"), len(RANGES))
    assert found == wanted(RANGES)
    assert slowest < 4, "one after the other would take 16 s"
    assert store.requests("GET") == len(RANGES)


@pytest.mark.parametrize("fault", ["reset", "cut", "busy", "stall"])
def test_what_goes_wrong_is_read_again(store: Bucket, fault: str) -> None:
    setattr(store.faults, fault, 0.2 if fault != "stall" else 0.05)
    assert in_worker(read, RANGES)[0] == wanted(RANGES)
    assert store.faults.counts[fault] > 0


def test_errors_are_those_of_any_request(store: Bucket) -> None:
    [error] = in_worker(read, [(0, 10)], '"another"')[0]
    assert isinstance(error, ReplacedError)
    assert 'etag "another"' in str(error)
    [error] = in_worker(read, [(0, 10)], "", 1, "none.tar")[0]
    assert isinstance(error, MissingObjectError)
    store.store.objects["bucket/far/a b.tar"] = DATA + b"more"
    [error] = in_worker(read, [(0, 10)])[0]
    assert isinstance(error, ReplacedError)


def test_slow_answers_get_a_second_request_and_few_do(store: Bucket) -> None:
    store.faults.tail, store.faults.tail_seconds = 0.02, 10.0
    ranges = [(number, number + 50) for number in range(600)]
    found, slowest, hedges = in_worker(read, ranges, "", 40)
    assert found == wanted(ranges)
    assert slowest < 3
    assert 0 < hedges <= 30


def test_second_requests_stay_within_a_twentieth() -> None:
    latencies = late.Latencies()
    for _ in range(19):
        latencies.num_reads += 1
        latencies.took(0.01)
    assert latencies.delay() == 0, "too few were seen"
    for _ in range(81):
        latencies.num_reads += 1
        latencies.took(0.2)
    assert latencies.delay() == pytest.approx(0.6)
    assert sum(latencies.may_hedge() for _ in range(100)) == 5


@pytest.mark.parametrize("closed", [False, True])
def test_a_store_that_wants_to_be_asked_nothing_gets_no_second_requests(closed: bool) -> None:
    assert in_worker(tries_of_late_reads, closed) == (10 if closed else 12)


def tries_of_late_reads(closed: bool) -> int:
    tries, answer, info = list[Get](), threading.Event(), ObjectInfo(len(DATA))

    def read_late(get: Get) -> Any:
        tries.append(get)
        answer.wait(20)
        return DATA, info

    late._read = read_late
    reads = late.LateReads()
    reads.latencies.num_reads = 30  # and ten more: two second requests
    for _ in range(20):
        reads.latencies.took(0.01)
    if closed:
        patience._closed["s3://bucket"] = time.monotonic() + 20
    futures = [reads.submit(Get(URL, "a", 0, 1)) for _ in range(10)]
    time.sleep(0.5)
    answer.set()
    assert all(future.result(10) == (DATA, info) for future in futures)
    return len(tries)


def test_reads_that_failed_wait_without_asking_once_more(store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNVLM_RETRIES", "1")
    answer, asked, until = store.store.answer, list[float](), time.monotonic() + 3

    def dead(*arguments: Any) -> Any:
        asked.append(time.monotonic())
        return (500, {}, b"") if asked[-1] < until else answer(*arguments)

    monkeypatch.setattr(store.store, "answer", dead)
    assert in_worker(read, RANGES[:16])[0] == wanted(RANGES[:16])
    assert 32 <= sum(when < until for when in asked) <= 38, "twice each, then one of them every two seconds"


def test_many_threads_share_one_client(store: Bucket) -> None:
    assert in_worker(clients_made) == 1


def clients_made() -> int:
    import obstore.store

    made, make = list[str](), obstore.store.from_url

    def slowly(url: str, **options: Any) -> Any:
        made.append(url)
        time.sleep(0.2)
        return make(url, **options)

    obstore.store.from_url = slowly
    assert read(RANGES)[0] == wanted(RANGES)
    return len(made)


def test_what_is_not_wanted_any_more_is_no_result(store: Bucket) -> None:
    store.faults.latency = 0.3
    assert in_worker(cancel) == (True, DATA[5:15], {})


def cancel() -> Any:
    dropped = [late.submit(Get(URL, "a b.tar", 0, 10)) for _ in range(8)]
    time.sleep(0.15)
    are_dropped = all(each.cancel() for each in dropped)
    data = bytes(late.submit(Get(URL, "a b.tar", 5, 15)).result()[0])
    time.sleep(0.1)
    assert late._reads is not None
    return are_dropped, data, late._reads._flying


def test_a_child_of_a_process_that_read_is_told(store: Bucket) -> None:
    assert in_worker(read_then_fork) == "LoadError"


def read_then_fork() -> str:
    assert read([(0, 10)])[0] == [DATA[:10]]
    return str(in_worker(name_of_error))


def name_of_error() -> str:
    assert engine.is_leaf()
    try:
        late.submit(Get(URL, "a b.tar", 0, 10, hedged=True))
    except LoadError as error:
        return type(error).__name__
    return "none"
