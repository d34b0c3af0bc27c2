"""Whole objects into files, by threads: every part in its place whatever goes wrong, and an end that waits for none."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import CancelledError
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.stores import engine, helper, remote, requests
from data_pipeline.stores.failures import ReplacedError
from data_pipeline.stores.requests import Download, Get
from data_pipeline.stores.waiting import outages
from tests.data_pipeline.stores.test_late import in_worker
from tests.fixtures.buckets import Bucket
from tests.stores.servers import Answer
from tests.web import web_server

DATA = os.urandom(1_000_003)
URL = "s3://bucket/far"


@pytest.fixture
def path(bucket: Bucket, tmp_path: Path) -> Path:
    """An empty file of the object's size."""
    bucket.store.objects["bucket/far/a b.tar"] = DATA
    path = tmp_path / "a b.tar"
    path.write_bytes(bytes(len(DATA)))
    return path


def request(path: Path, etag: str = "", size: int = len(DATA)) -> Download:
    return Download(Get(URL, path.name, 0, size, etag, size), str(path))


def ask(path: Path, etag: str = "", size: int = len(DATA)) -> str:
    try:
        helper.ask(request(path, etag, size))
    except DataError as error:
        return type(error).__name__
    return ""


@pytest.mark.parametrize("part_bytes", [64 * 1024, 10**9])
def test_every_byte_comes_through_faults(
    bucket: Bucket, path: Path, part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "DOWNLOAD_BYTES", part_bytes)
    bucket.faults.cut = bucket.faults.reset = 0.2
    assert in_worker(ask, path, bucket.etag("far/a b.tar")) == ""
    assert path.read_bytes() == DATA
    bucket.faults.cut = bucket.faults.reset = 0.0
    assert in_worker(ask, path, '"another"') == ReplacedError.__name__


def test_a_slow_part_comes_while_bytes_come(bucket: Bucket, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any read ends after two minutes: large parts never came over a slow line that they share."""
    monkeypatch.setattr(remote, "_WRITE_TIMEOUT", 1.0)
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    monkeypatch.setenv("ALIGNVLM_READ_TIMEOUT", "0.4")  # 4.8 s for any other read
    data = bucket.store.objects["bucket/far/a b.tar"] = 4 * DATA
    bucket.faults.bandwidth = len(data) / 8
    assert in_worker(ask, path, "", len(data)) == ""
    assert path.read_bytes() == data
    assert bucket.requests("GET") <= 2


def test_a_part_goes_on_where_it_broke_off(bucket: Bucket, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = list[str](), bucket.store.answer

    def answered(method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        asked.append(headers.get("range", ""))
        bucket.faults.cut = float(len(asked) < 2)
        return answer(method, target, headers, body)

    monkeypatch.setattr(bucket.store, "answer", answered)
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    assert in_worker(ask, path) == ""
    assert path.read_bytes() == DATA
    first, *_, last = asked
    assert first == f"bytes=0-{len(DATA) - 1}"
    assert re.fullmatch(rf"bytes=[1-9]\d{{4,}}-{len(DATA) - 1}", last)


class BreaksOff(BaseHTTPRequestHandler):
    """An object with a strong ETag, whose first answers end too early."""

    answers_ranges: bool
    most_bytes = 100_000
    num_short: int

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", "")) if self.answers_ranges else None
        begin, end = (int(found[1]), int(found[2]) + 1) if found else (0, len(DATA))
        self.send_response(206 if found else 200)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(end - begin))
        if found:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(DATA)}")
        self.end_headers()
        if self.command == "GET" and (found or "range" not in self.headers):
            kind = type(self)
            is_short, kind.num_short = kind.num_short > 0, kind.num_short - 1
            self.wfile.write(DATA[begin : begin + self.most_bytes] if is_short else DATA[begin:end])


def ask_web(port: int, path: Path) -> str:
    get = Get(f"http://127.0.0.1:{port}/far", path.name, 0, len(DATA), size=len(DATA))
    try:
        helper.ask(Download(get, str(path)))
    except DataError as error:
        return str(error)
    return ""


def test_patience_begins_anew_while_bytes_come(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was over five minutes after a part had broken off first, however much had come since."""
    monkeypatch.setattr(remote, "_CHUNK_BYTES", 10_000)
    monkeypatch.setattr(outages, "RETRY_SECONDS", 0.3)
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    monkeypatch.setenv("ALIGNVLM_PATIENCE", "1.5")
    with web_server(type("Ranges", (BreaksOff,), {"answers_ranges": True, "num_short": 8})) as port:
        began = time.monotonic()
        assert in_worker(ask_web, port, path) == ""
        assert time.monotonic() - began > 1.5
    assert path.read_bytes() == DATA


def test_a_whole_object_that_breaks_off_without_ranges_comes_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client itself asks for the rest by a range, and the answer to that ended the run."""
    monkeypatch.setattr(outages, "RETRY_SECONDS", 0.1)
    kind = type("Whole", (BreaksOff,), {"answers_ranges": False, "num_short": 1})
    with web_server(kind) as port:
        assert in_worker(ask_web, port, path) == ""
        assert path.read_bytes() == DATA
        kind.num_short = 1  # type: ignore[attr-defined]
        assert helper.ask(Get(f"http://127.0.0.1:{port}/far", path.name))[0] == DATA


def end_one_that_stalls(path: Path) -> Any:
    """Seconds that the end of a download takes, and what came and was written after it."""

    def is_open() -> bool:
        return any(os.path.realpath(f"/proc/self/fd/{each}") == str(path) for each in os.listdir("/proc/self/fd"))

    future = engine.submit(request(path).run())
    while not any(path.read_bytes()):
        time.sleep(0.02)
    began = time.monotonic()
    future.cancel()
    while is_open():
        time.sleep(0.01)
    seconds, before = time.monotonic() - began, path.read_bytes()
    try:
        future.result()
    except CancelledError:
        time.sleep(1.5)  # the thread goes on, and has all of it by then
        return seconds, before == path.read_bytes() != DATA
    return None


def test_the_end_of_a_download_waits_for_no_thread_and_nothing_is_written_after_it(
    bucket: Bucket, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.faults.bandwidth = len(DATA) / 1.5
    seconds, is_left_alone = in_worker(end_one_that_stalls, path)
    assert seconds < 0.5
    assert is_left_alone
    bucket.faults.bandwidth, bucket.faults.stall = 0.0, 1.0
    monkeypatch.setenv("ALIGNVLM_READ_TIMEOUT", "60")
    began = time.monotonic()
    in_worker(end_one_that_stalls, path)
    assert time.monotonic() - began < 20  # the end of the process waits for none either
