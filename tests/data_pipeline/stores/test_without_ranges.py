"""Servers that answer no ranged requests, or wrongly: whole shards are copied and trained on, all else says what to do.

Python's own is one of them.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from functools import partial, partialmethod
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError, LoadError
from data_pipeline.importers.fetch import fetch_shards
from data_pipeline.loading.loader import build_loader
from data_pipeline.loading.read_mode import choose
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.sources import Source, measure_source, open_source
from data_pipeline.shards.storage import open_storage
from data_pipeline.shards.verify import verify_folder
from data_pipeline.stores import helper, requests
from data_pipeline.stores.failures import NoRangesError, ReplacedError
from data_pipeline.stores.requests import Download, Get
from tests.data_pipeline.loading.test_loader import same
from tests.data_pipeline.stores.test_late import in_worker
from tests.data_pipeline.stores.test_loading import plan_of
from tests.fixtures.buckets import Bucket
from tests.stores.servers import Answer, MemoryS3
from tests.web import web_server


@pytest.fixture
def web(bucket: Bucket, shard_folder: Path, encoder: Any) -> Iterator[str]:
    """The letters, measured, behind Python's web server."""
    measure_source(str(shard_folder), encoder, num_processes=1)
    begin = partialmethod(SimpleHTTPRequestHandler.__init__, directory=str(shard_folder))
    with web_server(type("Files", (SimpleHTTPRequestHandler,), {"__init__": begin})) as port:
        yield f"http://127.0.0.1:{port}"


def test_shards_are_copied_whole(web: str, shard_folder: Path, tmp_path: Path) -> None:
    manifest = fetch_shards(web, tmp_path / "here")
    assert manifest.fingerprint == SourceReader(shard_folder).fingerprint


def test_training_by_auto_takes_whole_shards_and_by_ranges_says_so(web: str, shard_folder: Path, encoder: Any) -> None:
    far, near = (open_source("letters", folder, encoder) for folder in (web, str(shard_folder)))
    assert isinstance(far, Source)
    assert isinstance(near, Source)
    plan = plan_of(far)
    choice = choose(plan, {}, nodes=1000, cache_bytes=10**9)["letters"]
    assert str(choice) == "shards (its server answers no ranged requests)"
    steps = list(build_loader(plan, encoder, num_workers=1, cache_bytes=10**9))
    reference = list(build_loader(plan_of(near), encoder, num_workers=0))
    assert len(steps) == len(reference)
    assert all(same(a, b) for x, y in zip(steps, reference, strict=True) for a, b in zip(x, y, strict=True))
    with pytest.raises(LoadError, match=r"answers no ranged requests.*`alignvlm data fetch`.*`read: shards`"):
        list(build_loader(plan, encoder, num_workers=1, reads={"letters": "ranges"}))


def test_verify_calls_no_shard_damaged(web: str) -> None:
    with pytest.raises(NoRangesError, match=r"000000\.tar: .*answers no ranged requests"):
        verify_folder(web, num_processes=1)


class Wrong(MemoryS3):
    """Ranges are answered by 200, or with a header that is wrong."""

    content_range: str | None = None

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        if self.content_range is None:
            return super().answer(method, target, {key: headers[key] for key in headers if key != "range"}, body)
        status, more, data = super().answer(method, target, headers, body)
        return status, more | ({"content-range": self.content_range} if status == 206 else {}), data


@pytest.mark.parametrize("part_bytes", [300_000, 10**9])
@pytest.mark.parametrize("content_range", [None, "octets 1", "bytes 1-2/1000003", ""])
def test_an_object_comes_whole_where_its_parts_do_not(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content_range: str | None, part_bytes: int
) -> None:
    data, path = os.urandom(1_000_003), tmp_path / "x.tar"
    bucket.store.objects["bucket/far/x.tar"] = data
    wrong = Wrong()
    wrong.objects, wrong.content_range = bucket.store.objects, content_range
    monkeypatch.setattr(bucket.store, "answer", wrong.answer)
    path.write_bytes(b"")
    monkeypatch.setattr(requests, "DOWNLOAD_BYTES", part_bytes)
    began, get = time.monotonic(), Get("s3://bucket/far", "x.tar", 0, len(data), size=len(data))
    assert in_worker(ask, Download(get, str(path))) == ""
    assert path.read_bytes() == data
    assert in_worker(ask, Get("s3://bucket/far", "x.tar", 0, 10)) == NoRangesError.__name__
    bucket.store.objects["bucket/far/x.tar"] = data + data
    assert in_worker(ask, Download(get, str(path))) == ReplacedError.__name__
    assert path.stat().st_size == len(data)
    assert time.monotonic() - began < 10, "without patience"


def ask(request: Any) -> str:
    """The name of the error of a request, or nothing."""
    try:
        helper.ask(request)
    except DataError as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize("more", [-1, 1])
def test_a_range_of_another_length_is_asked_for_again(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, more: int
) -> None:
    """It ended the run."""
    answer, asked = bucket.store.answer, list[str]()
    bucket.store.objects["bucket/docs/x"] = bytes(100)

    def wrong(*request: Any) -> Any:
        status, headers, data = answer(*request)
        asked.append(request[0])
        return status, headers, (data + b"1")[: len(data) + more] if len(asked) == 1 else data

    monkeypatch.setattr(bucket.store, "answer", wrong)
    assert open_storage("s3://bucket/docs").read_range("x", 10, 20) == bytes(20)
    with pytest.raises(LoadError, match=r"docs/x: 10 of 20 bytes came"):
        open_storage("s3://bucket/docs").read_range("x", 90, 20)


def test_a_wrong_date_is_said_at_once_and_none_is_taken(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client refuses such an answer whatever else it says."""
    answer, date = bucket.store.answer, {"last-modified": "yesterday"}
    bucket.store.objects["bucket/docs/x"] = b"1"

    def dated(*request: Any) -> Any:
        status, more, data = answer(*request)
        return status, {key: more[key] for key in more if key != "last-modified"} | date, data

    monkeypatch.setattr(bucket.store, "answer", dated)
    began = time.monotonic()
    for url in ("s3://bucket/docs", f"{bucket.endpoint}/bucket/docs"):
        with pytest.raises(LoadError, match=r"Invalid last modified 'yesterday'.*; let the server send a date as"):
            open_storage(url).read("x")
    assert time.monotonic() - began < 10, "without patience"
    date.clear()
    assert open_storage("s3://bucket/docs").read("x") == b"1"


HTML = b"<!DOCTYPE html><html><body>Please log in</body></html>"


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_page_in_the_place_of_a_store_is_called_one(
    bucket: Bucket, shard_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """A proxy answers every request by 200: a list was waited for, and the manifest to be made anew."""
    answer, pages = bucket.store.answer, ""
    url = bucket.upload(shard_folder, "docs")
    url = url if scheme == "s3" else f"{bucket.endpoint}/bucket/docs"

    def page(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        if pages in target:
            return 200, {"content-type": "text/html"}, HTML
        return answer(method, target, headers, body)

    monkeypatch.setattr(bucket.store, "answer", page)
    began, is_one = time.monotonic(), "a proxy or a login page may answer in the place of the store"
    for work in (verify_folder, partial(fetch_shards, folder=tmp_path / "x"), SourceReader):
        with pytest.raises(DataError, match=rf"docs/manifest\.json is a page of HTML or XML: {is_one}"):
            work(url)
    if scheme == "http":
        with pytest.raises(LoadError, match=rf"docs cannot be listed: .*{is_one}"):
            list(open_storage(url).list())
    if scheme == "s3":
        with pytest.raises(LoadError, match=rf"docs/x: .*ETag Header missing.*{is_one}"):
            open_storage(url).write("x", b"1")
    pages = "000001.tar"
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "other"))
    helper.stop()
    (line,) = verify_folder(url, num_processes=1)
    assert re.fullmatch(r"000001\.tar: 54 bytes, [\d,]+ when it was indexed", line)
    with pytest.raises(DataError, match=r"docs/000001\.tar has 54 bytes, and [\d,]+ in manifest\.json there: put the"):
        fetch_shards(url, tmp_path / "x")
    with pytest.raises(ReplacedError, match=r"000001\.tar was replaced since it was indexed \(.*; now 54 bytes"):
        SourceReader(url)[40]
    assert time.monotonic() - began < 15, "without patience"
