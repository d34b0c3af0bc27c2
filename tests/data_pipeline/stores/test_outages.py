"""An object that fails keeps nobody from the others of its store; what is waited for in vain is named in time."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import UnreachableError
from data_pipeline.stores import helper
from data_pipeline.stores.requests import Download, Get, Upload
from data_pipeline.stores.waiting.node_notes import raise_if_given_up
from tests.data_pipeline.stores.test_late import in_worker
from tests.fixtures.buckets import Bucket
from tests.stores.servers import Answer, MemoryS3

URL = "s3://bucket/docs"


class Broken:
    """Requests of some objects are answered by a status (null: those of all); `asked` has when."""

    def __init__(
        self, bucket: Bucket, names: list[str] | None, monkeypatch: pytest.MonkeyPatch, status: int = 500
    ) -> None:
        self.names, self.store, self.asked, self.status = names, bucket.store, list[float](), status
        self.store.objects |= {f"bucket/docs/{name}.tar": bytes(1000) for name in "abcdefgh"}
        monkeypatch.setattr(self.store, "answer", self._answer)

    def _answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        if self.names is None or any(target.endswith(f"/{name}") for name in self.names):
            self.asked.append(time.monotonic())
            return self.status, {}, b""
        return MemoryS3.answer(self.store, method, target, headers, body)


def read(names: str, seconds: float, hedged: bool) -> tuple[list[float], list[str], float]:
    """Read ranges of objects for some seconds, and one of a.tar; how long each took, what became of that, and when."""
    began, took, errors = time.monotonic(), list[float](), list[str]()

    def read_broken() -> None:
        try:
            helper.ask(Get(URL, "a.tar", 0, 10, hedged=hedged))
        except UnreachableError as error:
            errors.append(f"{time.monotonic() - began:.1f} {error}")

    threads = [threading.Thread(target=read_broken) for _ in range(3)]
    for thread in threads:
        thread.start()
    number = 0
    while time.monotonic() - began < seconds:
        asked = time.monotonic()
        helper.ask(Get(URL, f"{names[number % len(names)]}.tar", number % 900, number % 900 + 10, hedged=hedged))
        took.append(time.monotonic() - asked)
        number += 1
        time.sleep(0.02)
    for thread in threads:
        thread.join(30)
    return took, errors, time.time()


@pytest.mark.slow
@pytest.mark.parametrize("hedged", [False, True])
def test_an_object_that_fails_is_given_up_alone(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, hedged: bool) -> None:
    broken, began = Broken(bucket, ["a.tar"], monkeypatch), time.time()
    monkeypatch.setenv("ALIGNVLM_PATIENCE", "7")
    monkeypatch.setenv("ALIGNVLM_RETRIES", "2")
    helper.stop()
    took, errors, _ = (in_worker if hedged else lambda call, *args: call(*args))(read, "bcdefgh", 9.0, hedged)
    assert len(took) > 50
    assert max(took) < 1.5, "nobody waits for another object"
    assert len(errors) == 3
    for error in errors:
        seconds, said = error.split(" ", 1)
        assert 7 <= float(seconds) < 11
        assert said.startswith("s3://bucket/docs/a.tar: ")
        assert re.search("; no answer for [78] s, though s3://bucket answers other requests; the same command", said)
    later = [when for when in broken.asked if when > broken.asked[0] + 3]
    assert len(later) <= 3 * 4, "one of the three asks, every two seconds, three times in a row"
    raise_if_given_up(URL, ["b.tar"], began)
    with pytest.raises(UnreachableError, match=r"a\.tar: .*though s3://bucket answers"):
        raise_if_given_up(URL, ["a.tar"], began)


def test_two_objects_that_fail_stop_the_others_for_a_turn_at_most(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    Broken(bucket, ["a.tar", "b.tar"], monkeypatch)
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    helper.stop()
    failing = [helper.submit(Get(URL, f"{name}.tar", begin, begin + 1)) for begin in range(4) for name in "ab"]
    time.sleep(1)  # nothing else was asked for: the store may be away
    began = time.monotonic()
    for name in "cdefgh":
        helper.ask(Get(URL, f"{name}.tar", 0, 10))
    assert time.monotonic() - began < 8, "it is their turn before those of the same two objects"
    began = time.monotonic()
    for begin in range(50):
        helper.ask(Get(URL, "h.tar", begin, begin + 10))
        time.sleep(0.05)
    assert time.monotonic() - began < 2.5 + 4
    assert not any(each.done() for each in failing)


def test_an_object_that_is_always_refused_stops_the_others_once(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a 503 nobody knows at first whether the store is busy; it stopped them for two of every two seconds."""
    broken = Broken(bucket, ["a.tar"], monkeypatch, status=503)
    monkeypatch.setenv("ALIGNVLM_RETRIES", "0")
    helper.stop()
    failing = [helper.submit(Get(URL, "a.tar", begin, begin + 1)) for begin in range(4)]
    time.sleep(0.5)
    began, took = time.monotonic(), list[float]()
    while time.monotonic() - began < 9:
        asked = time.monotonic()
        helper.ask(Get(URL, "b.tar", 0, 10))
        took.append(time.monotonic() - asked)
        time.sleep(0.05)
    assert sum(each for each in took if each > 0.5) < 5, "also where the helper takes long to start"
    assert len([when for when in broken.asked if when > began + 3]) >= 2, "it is asked for again"
    assert not any(each.done() for each in failing)


@pytest.mark.slow
def test_patience_ends_when_it_says(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though one round of retries takes six seconds."""
    for name, value in {"PATIENCE": "9", "RETRIES": "1", "READ_TIMEOUT": "3"}.items():
        monkeypatch.setenv(f"ALIGNVLM_{name}", value)
    bucket.faults.latency = 3600.0
    began, requests = time.monotonic(), [helper.submit(Get(URL, f"{name}.tar", 0, 100)) for name in "abcdefgh"]
    for request in requests:
        with pytest.raises(UnreachableError, match=r"no answer for (9|10) s; .* when the store is back"):
            request.result()
    assert 9 <= time.monotonic() - began < 9 + 4.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_whole_object_that_goes_on_is_not_cut_off(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Its second try begins within patience and ends behind it; keys that only write may not ask before."""
    tries: list[float] = []

    def answer(asked: str, target: str, headers: dict[str, str], body: bytes) -> Any:
        if asked == "HEAD" and method == "PUT":
            return 403, {}, b""
        if asked == method:
            tries.append(time.monotonic())
            if len(tries) == 1:
                return 500, {}, b""
            time.sleep(6)
        return MemoryS3.answer(bucket.store, asked, target, headers, body)

    monkeypatch.setattr(bucket.store, "answer", answer)
    for name, value in {"PATIENCE": "4", "RETRIES": "0", "READ_TIMEOUT": "20"}.items():
        monkeypatch.setenv(f"ALIGNVLM_{name}", value)
    helper.stop()
    path, data = tmp_path / "x", bytes(range(250)) * 4
    if method == "PUT":
        path.write_bytes(data)
        helper.ask(Upload(URL, [("x.tar", str(path))]))
        assert bucket.store.objects["bucket/docs/x.tar"] == data
    else:
        path.write_bytes(b"")
        bucket.store.objects["bucket/docs/x.tar"] = data
        helper.ask(Download(Get(URL, "x.tar", 0, len(data), size=len(data)), str(path)))
        assert path.read_bytes() == data
    assert len(tries) == 2
    assert time.monotonic() - tries[0] > 5
