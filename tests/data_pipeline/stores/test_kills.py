"""`kill -9` in the middle of a download: nothing half is left, and the next start does what was to be done."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

from data_pipeline.importers.fetch import fetch_shards
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.sources import Source, measure_source, open_source
from data_pipeline.stores import helper
from data_pipeline.stores.folders import node_folder
from tests.fixtures.buckets import Bucket
from tests.fixtures.letters import LetterEncoder

Work = Callable[[str, Path], object]
ENCODER = LetterEncoder()
WORKS: dict[str, tuple[Work, str]] = {
    "index": (lambda url, _: index_shards(url, num_processes=1), ".tar"),
    "measure": (lambda url, _: measure_source(url, ENCODER, num_processes=1), ".tar"),
    "manifest": (lambda url, _: open_source("s", url, ENCODER), "manifest.json"),
    "lengths": (lambda url, _: open_source("s", url, ENCODER), ".npy"),
    "sample": (lambda url, _: open_source("s", url, ENCODER).reader[33], ".index.jsonl"),
    "fetch": (lambda url, folder: fetch_shards(url, folder / "copy"), "000002.tar"),
}
"""What a process does, and what it downloads when it is killed."""


@pytest.mark.parametrize("what", WORKS)
def test_the_next_start_is_clean(
    bucket: Bucket, shard_folder: Path, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    work, suffix = WORKS[what]
    url = f"{bucket.url}/letters"
    bucket.store.objects = {f"bucket/letters/{path.name}": path.read_bytes() for path in shard_folder.glob("*.tar")}
    if what != "index":
        index_shards(url, num_processes=1)
    if what not in ("index", "measure"):
        measure_source(url, ENCODER, num_processes=1)
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-2"))
    monkeypatch.setenv("ALIGNVLM_READ_TIMEOUT", "30")
    answer = bucket.store.answer

    def stalled(method: str, target: str, *rest: Any) -> Any:
        if method == "GET" and urlsplit(target).path.endswith(suffix):
            bucket.faults.stall = 1.0  # half of the body comes
        return answer(method, target, *rest)

    monkeypatch.setattr(bucket.store, "answer", stalled)
    process = multiprocessing.get_context("fork").Process(target=work, args=(url, tmp_path))
    process.start()
    began = time.monotonic()
    while not bucket.faults.counts["stall"] and time.monotonic() - began < 30:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert bucket.faults.counts["stall"]
    bucket.faults.stall = 0.0
    monkeypatch.setattr(bucket.store, "answer", answer)
    helper.stop()
    work(url, tmp_path)
    index_shards(url, num_processes=1)
    measure_source(url, ENCODER, num_processes=1)
    there = open_source("s", url, ENCODER)
    assert there.fingerprint == source.fingerprint
    assert np.array_equal(there.measures, source.measures)
    assert there.reader[299].messages == source.reader[299].messages
    if what == "fetch":
        copies = {path.name: path.read_bytes() for path in (tmp_path / "copy").glob("*.tar")}
        assert copies == {path.name: path.read_bytes() for path in shard_folder.glob("*.tar")}
    assert [*node_folder(url).rglob("*.tmp"), *(tmp_path / "copy").rglob("*.tmp")] == []
