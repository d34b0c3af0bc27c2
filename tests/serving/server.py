"""A real server on loopback for tests, in a thread of this process, and a client of one."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from PIL import Image
from starlette.types import ASGIApp

from alignvlm.serving.web.server import configuration, listen
from tests.fixtures.zoo import save
from tests.waiting import until


@contextlib.contextmanager
def running(app: ASGIApp) -> Iterator[int]:
    """Serve an application; gives its port."""
    bound = listen("127.0.0.1", 0)
    server = uvicorn.Server(configuration(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    port = bound.getsockname()[1]
    thread.start()
    try:
        until(lambda: server.started)
        yield port
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def head(path: str, length: int, kind: str = "application/json") -> bytes:
    """What comes before a request's body."""
    lines = f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Type: {kind}", f"Content-Length: {length}", "", ""
    return "\r\n".join(lines).encode()


def data_url(image: Image.Image) -> str:
    """An image as clients send it."""
    return f"data:image/png;base64,{base64.b64encode(save(image)).decode()}"


def question(text: str, *images: Image.Image, **fields: Any) -> dict[str, Any]:
    """A request with one message."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **fields}


def ask(
    port: int, body: Any, path: str = "/v1/chat/completions", method: str = "POST", **headers: str
) -> tuple[int, Any]:
    """Status and JSON of a response; `body` is JSON, or bytes as they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    with contextlib.closing(connection):
        connection.request(method, path, data, sent)
        response = connection.getresponse()
        return response.status, json.loads(response.read())


def stream(port: int, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed answer as they arrive; checks that it ends as OpenAI's do."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(
            "POST", "/v1/chat/completions", json.dumps({**body, "stream": True}), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        assert response.status == 200, response.read()
        assert response.headers.get_content_type() == "text/event-stream"
        lines = iter(response.readline, b"")
        for line in filter(None, map(bytes.strip, lines)):
            if line == b"data: [DONE]":
                return
            yield json.loads(line.removeprefix(b"data: "))
        raise AssertionError("the stream was cut off")
