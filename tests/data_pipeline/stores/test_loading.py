"""Batches from a bucket are those from disk, whatever the number of processes and whatever goes wrong on the way."""

from __future__ import annotations

import multiprocessing
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignvlm.cli import main
from data_pipeline.errors import LoadError, UnreachableError
from data_pipeline.loading.far import FarReads
from data_pipeline.loading.loader import build_loader
from data_pipeline.loading.read_mode import Read
from data_pipeline.loading.whole import WholeShards
from data_pipeline.order.plan import Plan
from data_pipeline.order.settings import PlanSettings
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.sources import Source, measure_source, open_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.stores import engine, helper
from data_pipeline.stores.failures import MissingObjectError
from data_pipeline.stores.requests import Get
from data_pipeline.stores.waiting import outages
from tests.data_pipeline.loading.test_loader import same
from tests.fixtures.buckets import Bucket

SETTINGS = PlanSettings(sequence_length=120, global_batch_packs=8, window_shards=3, mix_block=32, pack_window=100)


def plan_of(source: Source) -> Plan:
    return Plan({"letters": source}, {"letters": 1.0}, replace(SETTINGS, seed=3))


@pytest.fixture
def far(bucket: Bucket, shard_folder: Path, encoder: Any) -> Plan:
    """The plan of the letters, read from the bucket."""
    url = bucket.upload(shard_folder, "letters")
    index_shards(url, num_processes=1)
    measure_source(url, encoder, num_processes=1)
    return plan_of(open_source("letters", url, encoder))


RANGES: dict[str, Read] = {"letters": "ranges"}


@pytest.mark.parametrize(("read", "workers", "more"), [("ranges", 0, 1), ("ranges", 2, 1), ("shards", 2, 8)])
def test_batches_are_those_from_disk_whatever_goes_wrong(
    bucket: Bucket, far: Plan, source: Source, encoder: Any, read: Read, workers: int, more: int
) -> None:
    near = plan_of(source)
    assert far.fingerprint == near.fingerprint
    for name, share in {"busy": 0.05, "reset": 0.01, "cut": 0.01, "stall": 0.005}.items():
        setattr(bucket.faults, name, share * more)
    steps = list(build_loader(far, encoder, num_workers=workers, reads={"letters": read}))
    reference = list(build_loader(near, encoder, num_workers=0))
    assert len(steps) == len(reference)
    assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
    happened = [bucket.faults.counts[name] for name in ("busy", "reset", "cut")]
    assert min(happened) > 0 if read == "ranges" else sum(happened) > 0


def test_a_replaced_shard_stops_the_loader_and_is_named(bucket: Bucket, far: Plan, encoder: Any) -> None:
    bucket.store.objects["bucket/letters/000003.tar"] = bucket.store.objects["bucket/letters/000002.tar"]
    with pytest.raises(LoadError, match=r"letters/000003\.tar was replaced since it was indexed"):
        list(build_loader(far, encoder, num_workers=1, reads=RANGES))


def test_an_outage_that_outlasts_the_retries_of_a_read_is_waited_for(
    bucket: Bucket, far: Plan, source: Source, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNVLM_RETRIES", "1")  # 0.1 s instead of 30
    monkeypatch.setattr(outages, "RETRY_SECONDS", 0.2)
    steps = []
    for step in build_loader(far, encoder, num_workers=1, prefetch=1, reads=RANGES):
        if not steps:
            bucket.faults.down = True
            threading.Timer(2.0, setattr, (bucket.faults, "down", False)).start()
        steps.append(step)
    reference = list(build_loader(plan_of(source), encoder, num_workers=0))
    assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
    assert bucket.faults.counts["reset"] > 2


def test_a_command_that_waited_in_vain_is_to_be_started_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    bucket.faults.down = True
    for name, value in {"ALIGNVLM_PATIENCE": "0.5", "ALIGNVLM_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)
    helper.stop()
    assert main(["data", "index", "s3://bucket/letters"]) == 75
    warning, error = capfd.readouterr().err.splitlines()
    assert re.search(r"s3://bucket/letters: .*; waiting for the store, at most \d s$", warning)
    assert re.fullmatch(
        r"alignvlm: s3://bucket/letters: .*; no answer for \d s; the same command goes on when .*", error
    )


def test_a_store_that_stays_away_is_waited_for_and_then_named(
    bucket: Bucket, far: Plan, encoder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.faults.down = True
    monkeypatch.setenv("ALIGNVLM_PATIENCE", "1")
    monkeypatch.setenv("ALIGNVLM_RETRIES", "1")
    began = time.monotonic()
    with pytest.raises(UnreachableError, match=r"no answer for \d+ s; the same command goes on when"):
        list(build_loader(far, encoder, num_workers=1, reads=RANGES))
    assert time.monotonic() - began > 1


def used_before_a_fork(results: Any) -> None:
    """In a process of its own: read, fork, read in the child."""
    request = Get("s3://bucket/letters", "manifest.json")
    assert engine.submit(request.run()).result()[0]
    child = multiprocessing.get_context("fork").Process(target=read_again, args=(results,))
    child.start()
    child.join(10)
    if child.is_alive():
        child.kill()
        results.put("it hangs")


def read_again(results: Any) -> None:
    try:
        open_storage("s3://bucket/letters").read("manifest.json")
    except LoadError as error:
        results.put(str(error))


@pytest.mark.parametrize("error", [MissingObjectError("s3://b/1.tar: it is gone"), OSError(5, "Input/output error")])
def test_what_stops_a_loader_process_is_told_to_all_ranks(far: Plan, encoder: Any, error: Exception) -> None:
    """As a LoadError, on which ranks agree; raised, it would end this rank alone."""
    loader = build_loader(far, encoder, num_workers=0)

    class Broken(FarReads):
        def begin(self, *_: Any) -> None:
            raise error

    loader._loader.dataset._far = Broken([], 0, WholeShards(far, [], 0))  # type: ignore[attr-defined]
    with pytest.raises(LoadError, match=re.escape(str(error))):
        next(iter(loader))


def test_a_store_that_was_used_before_a_fork_is_an_error_not_a_hang(far: Plan) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=used_before_a_fork, args=(results,))
    process.start()
    assert "used before this process was forked" in results.get(timeout=20)
    process.join(10)
