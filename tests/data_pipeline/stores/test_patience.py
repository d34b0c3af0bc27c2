"""A server that says when it wants to be asked again is asked nothing until then."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import pytest

from data_pipeline.errors import UnreachableError
from data_pipeline.shards.storage import open_storage
from data_pipeline.stores import helper
from data_pipeline.stores.requests import Get
from data_pipeline.stores.waiting.patience import MOST_SECONDS, asked_pause, seconds_asked
from tests.stores.servers import Answer, MemoryS3, serve_memory


class BusyServer(MemoryS3):
    """Refuses everything until a time, and says when that is; `asked` has the time of each request."""

    def __init__(self) -> None:
        super().__init__()
        self.busy_until, self.asked = 0.0, list[float]()

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        self.asked.append(time.monotonic())
        left = self.busy_until - time.monotonic()
        if left > 0:
            return 429, {"ratelimit": f'"resolvers";r=0;t={int(left) + 1}'}, b""
        return super().answer(method, target, headers, body)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[BusyServer, str]]:
    """The server and its URL."""
    store = BusyServer()
    store.objects["docs/a.tar"] = bytes(100)
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-cache"))
    monkeypatch.setenv("ALIGNVLM_PATIENCE", "20")
    with serve_memory(store) as endpoint:
        helper.stop()
        yield store, f"{endpoint}/docs"
        helper.stop()


def test_nothing_is_asked_before_the_time_that_a_server_names(server: tuple[BusyServer, str]) -> None:
    store, url = server
    storage = open_storage(url)
    assert len(storage.read_range("a.tar", 0, 10)) == 10  # the helper runs
    store.asked.clear()
    store.busy_until = time.monotonic() + 4
    requests = [helper.submit(Get(url, "a.tar", begin, begin + 1)) for begin in range(12)]
    assert [len(request.result()[0]) for request in requests] == [1] * 12
    early = [when for when in store.asked if when < store.busy_until]
    assert early
    assert max(early) < store.busy_until - 2.5, "refused requests end with the question for how long, within a second"
    assert len(early) <= 12 * 3 + 1
    assert len(store.asked) - len(early) == 12


class DeadServer(BusyServer):
    """Answers nothing until a time."""

    def answer(self, method: str, target: str, headers: dict[str, str], body: bytes) -> Answer:
        self.asked.append(time.monotonic())
        return (
            (500, {}, b"")
            if time.monotonic() < self.busy_until
            else MemoryS3.answer(self, method, target, headers, body)
        )


def test_one_request_asks_for_an_outage_and_all_go_on_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DeadServer()
    store.objects["docs/a.tar"] = bytes(100)
    for name, value in {"CACHE": str(tmp_path), "PATIENCE": "20", "RETRIES": "1"}.items():
        monkeypatch.setenv(f"ALIGNVLM_{name}", value)
    with serve_memory(store) as endpoint:
        helper.stop()
        url = f"{endpoint}/docs"
        assert len(open_storage(url).read_range("a.tar", 0, 10)) == 10  # the helper runs
        store.asked.clear()
        began = time.monotonic()
        store.busy_until = began + 5
        requests = [helper.submit(Get(url, "a.tar", begin, begin + 1)) for begin in range(64)]
        assert [len(request.result()[0]) for request in requests] == [1] * 64
        ended = time.monotonic()
        helper.stop()
    later = [when for when in store.asked if began + 2 < when < store.busy_until]
    assert 1 <= len(later) <= 6, "two requests every two seconds"
    assert ended < store.busy_until + 4
    assert sum(when >= store.busy_until for when in store.asked) == 64


def test_patience_ends_in_a_longer_pause(server: tuple[BusyServer, str], monkeypatch: pytest.MonkeyPatch) -> None:
    store, url = server
    store.busy_until = time.monotonic() + 600
    monkeypatch.setenv("ALIGNVLM_PATIENCE", "1")
    with pytest.raises(UnreachableError, match=r"429.*no answer for 1 s"):
        open_storage(url).read_range("a.tar", 0, 10)
    assert 590 < asked_pause(url) <= 600
    assert asked_pause("s3://bucket/docs") == 0, "nobody knows"
    monkeypatch.setenv("http_proxy", url.removesuffix("/docs"))
    assert 590 < asked_pause("http://name:word@far.example/docs") <= 600, "by the proxy that obstore takes"


def test_how_servers_say_it() -> None:
    assert seconds_asked({"retry-after": "7"}) == 7
    assert seconds_asked({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=2)
    assert seconds_asked({"retry-after": formatdate(time.time() - 30, usegmt=True)}) == 0
    assert seconds_asked({"ratelimit": '"api";r=0;t=55', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}) == 55
    assert seconds_asked({"retry-after": "soon"}) == 0
    assert seconds_asked({"retry-after": "\N{SUPERSCRIPT TWO}"}) == 0
    assert seconds_asked({}) == 0
    assert seconds_asked({"retry-after": "99999999"}) == MOST_SECONDS
