"""Clients that are slow, stand still, or go away: none of them keeps the others from being answered."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Send

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.serving.app import create_app
from alignvlm.serving.demo import app as demo
from alignvlm.serving.demo.app import BYTES, demo_routes
from alignvlm.serving.engine import Engine
from alignvlm.serving.web import connections
from alignvlm.serving.web.guarded import Guarded
from alignvlm.serving.web.limits import Limits
from tests.fixtures.zoo import save
from tests.serving.server import ask, head, question, running
from tests.tiny import picture, tiny_model
from tests.waiting import until

PATH = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(ModelAnswerer(*tiny_model(), "cpu"), "tiny")
    yield engine
    engine.stop()


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def test_a_request_that_does_not_arrive_is_given_up_and_holds_no_place(engine: Engine) -> None:
    limits = Limits(max_requests=1, silent_seconds=0.5)
    with running(create_app(engine, limits)) as port, connect(port) as silent:
        silent.sendall(head(PATH, 100) + b"{")
        assert ask(port, HELLO | {"max_tokens": 1})[0] == 200
        assert silent.recv(100).startswith(b"HTTP/1.1 408")
    with running(create_app(engine, Limits(max_arriving=1))) as port, connect(port) as silent:
        silent.sendall(head(PATH, 100) + b"{")
        until(lambda: ask(port, HELLO | {"max_tokens": 1})[0] == 200)
        assert silent.recv(100).startswith(b"HTTP/1.1 408"), "it makes room"
    with running(create_app(engine, Limits(body_seconds=0.5))) as port, connect(port) as dripping:
        dripping.sendall(head(PATH, 100))
        dripping.settimeout(0.05)
        answer = b""
        for _ in range(100):
            dripping.sendall(b" ")
            try:
                answer = dripping.recv(100)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")


def test_too_large_a_request_is_refused_before_it_is_sent(engine: Engine) -> None:
    with running(create_app(engine, Limits(max_body=1000))) as port, connect(port) as client:
        client.sendall(head(PATH, 1001))
        assert client.recv(100).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET /health HTTP/1.1\r\n\r\n",
        head(PATH, 5)[:-2] + b"Content-Length: 6\r\n\r\n",
        head(PATH, 5)[:-2] + b"X: \0\r\n\r\n",
    ],
)
def test_what_is_no_http_is_said_too(sent: bytes) -> None:
    with running(create_app(None)) as port, connect(port) as client:
        client.sendall(sent)
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, list(json.loads(response.read()))) == (400, ["error"])
        assert client.recv(100) == b"", "the connection ends"


def test_what_is_no_http_behind_a_response_ends_the_connection(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    with running(create_app(engine)) as port, connect(port) as client:
        client.sendall(head(PATH, 0, "text/plain").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        assert client.recv(1000).startswith(b"HTTP/1.1 415")
        client.sendall(b"zz\r\n")
        with contextlib.suppress(ConnectionResetError):
            while client.recv(1000):
                pass
    assert "Traceback" not in caplog.text


def test_half_a_head_is_cut_off(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running(create_app(engine)) as port:
        for before, begun in ((b"", b""), (b"", whole[:-2]), (whole, whole[:3])):
            with connect(port) as client:
                client.sendall(before)
                told = b""
                while before and not told.endswith(b'{"status":"ok"}'):
                    told += client.recv(1000)
                client.sendall(begun)
                assert client.recv(1000) == b"", "the server ends the connection"


def test_one_connection_too_many_ends_the_oldest_idle_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    with running(create_app(None)) as port, contextlib.ExitStack() as opened:
        clients = [opened.enter_context(connect(port)) for _ in range(5)]
        assert [client.recv(1) for client in clients[:2]] == [b"", b""]
        assert ask(port, None, "/health", "GET")[0] == 200
        clients[4].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert clients[4].recv(12) == b"HTTP/1.1 200"


def test_the_end_waits_for_no_request_that_is_still_arriving(engine: Engine) -> None:
    with running(create_app(engine)) as port:
        client = connect(port)
        client.sendall(head(PATH, 100) + b"{")
        until(lambda: ask(port, None, "/health", "GET")[0] == 200)
        begun = time.monotonic()
    assert time.monotonic() - begun < 5
    with client:
        assert client.recv(100) == b""


@pytest.mark.parametrize("reads", [False, True])
def test_a_reader_that_stands_still_is_cut_off_and_a_slow_one_is_not(
    reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.4)
    size = 40_000_000  # more than the system keeps for a connection
    ended = threading.Event()

    async def much(body: bytes, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": bytes(size), "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            ended.set()

    route = Route("/much", Guarded(much, BYTES, Limits(max_requests=1)), methods=["POST"])
    with running(create_app(None, routes=[route])) as port, connect(port) as client:
        client.sendall(head("/much", 1, BYTES) + b"x")
        if not reads:
            assert ended.wait(20)
            return
        got = 0
        while got < size:
            ended.wait(0.02)
            piece = client.recv(1_000_000)
            assert piece, f"cut off after {got:,} bytes"
            got += len(piece)


def test_who_left_while_waiting_is_not_answered(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views of the vocabulary: they have places too, and those that nobody waits for are not computed."""
    computed: list[int] = []
    monkeypatch.setattr(demo, "lay_vocabulary", lambda answerer, image: computed.append(image.width) or {})
    release, limits = threading.Event(), Limits(max_requests=2)
    engine._model.submit(release.wait, 60)
    waiting: list[socket.socket] = []
    try:
        with running(create_app(engine, limits, demo_routes("tiny", (), engine, limits))) as port:
            for width in (10, 20):
                file = save(picture(width, 10))
                waiting.append(connect(port))
                waiting[-1].sendall(head("/demo/vocabulary", len(file), BYTES) + file)
            until(lambda: ask(port, b"x", "/demo/vocabulary", Content_Type=BYTES)[0] == 503)
            waiting[0].close()
            until(lambda: ask(port, b"x", "/demo/vocabulary", Content_Type=BYTES)[0] == 400)
            release.set()
            assert waiting[1].recv(100).startswith(b"HTTP/1.1 200")
    finally:
        release.set()
        for client in waiting:
            client.close()
    assert computed == [20]


def test_who_left_before_the_prompt_is_computed_costs_nothing(engine: Engine) -> None:
    passes: list[int] = []
    hook = engine.answerer.model.register_forward_pre_hook(lambda *unused: passes.append(1))
    release = threading.Event()
    engine._images.submit(release.wait, 60)
    body = json.dumps(question("hi", picture(20, 20), max_tokens=5)).encode()
    try:
        with running(create_app(engine, Limits(max_requests=1))) as port:
            with connect(port) as client:
                client.sendall(head(PATH, len(body)) + body)
                until(lambda: engine._images._work_queue.qsize() > 0)
            release.set()
            until(lambda: ask(port, b"{")[0] == 400)
            asyncio.run(engine.run(int))
    finally:
        release.set()
        hook.remove()
    assert passes == []


def test_what_fails_in_a_route_of_ones_own_is_said_in_openais_shape(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(request: Any) -> Response:
        raise RuntimeError("inside")

    with running(create_app(None, routes=[Route("/page", fail)])) as port:
        status, reply = ask(port, None, "/page", "GET")
    assert (status, reply["error"]["code"]) == (500, "internal_error")
    assert "inside" not in reply["error"]["message"]
    assert "inside" in caplog.text
