"""Where a server reads images from: the request; a web server or folder only by name, and nothing beyond it."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from alignvlm.serving.errors import RequestError
from alignvlm.serving.images import read_source
from alignvlm.serving.requests import ChatRequest, Limits
from tests.tiny import picture


@pytest.fixture(scope="module")
def page() -> bytes:
    file = io.BytesIO()
    picture(20, 20).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def web(page: bytes) -> Iterator[str]:
    """A web server with /page.png, and /away, which sends on to it under another name of this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            away = self.path == "/away"
            self.send_response(302 if away else 200)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/page.png")  # type: ignore[attr-defined]
            self.end_headers()
            self.wfile.write(b"" if away else page)

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def refused(url: str, limits: Limits) -> str | None:
    with pytest.raises(RequestError) as caught:
        read_source(url, "p", limits)
    assert (caught.value.status, caught.value.param) == (400, "p")
    return caught.value.code


def test_a_web_server_is_asked_only_by_its_name(web: str, page: bytes) -> None:
    limits = Limits(image_hosts=("127.0.0.1",))
    assert read_source(f"http://{web}/page.png", "p", limits) == page
    assert refused(f"http://{web}/page.png", Limits()) == "image_url_not_allowed"
    for other in ("localhost", "127.0.0.1@localhost", "me@127.0.0.1", "127.0.0.1.example"):
        assert refused(f"http://{web.replace('127.0.0.1', other)}/page.png", limits) == "image_url_not_allowed"
    assert refused(f"http://{web}/away", limits) == "invalid_image"
    assert refused(f"http://{web}/page.png", Limits(image_hosts=("127.0.0.1",), max_body=100)) == "invalid_image"
    assert refused("http://[", limits) == "invalid_image"


def test_too_many_images_are_refused_before_the_first_is_read() -> None:
    part = {"type": "image_url", "image_url": {"url": "file:///missing"}}
    asked = ChatRequest.parse(json.dumps({"messages": [{"role": "user", "content": [part] * 3}]}).encode())
    with pytest.raises(RequestError, match="3 images; at most 2 are taken"):
        asked.conversation(Limits(max_images=2))


def test_files_are_read_in_one_folder_only(tmp_path: Path, page: bytes) -> None:
    (tmp_path / "open").mkdir()
    for name in ("open/a b.png", "secret.png"):
        (tmp_path / name).write_bytes(page)
    (tmp_path / "open" / "link.png").symlink_to(tmp_path / "secret.png")
    limits = Limits(image_folder=tmp_path / "open")
    assert read_source(f"file://{tmp_path}/open/a%20b.png", "p", limits) == page
    assert refused(f"file://{tmp_path}/open/a%20b.png", Limits()) == "image_url_not_allowed"
    for name in ("secret.png", "open/../secret.png", "open/%2e%2e/secret.png", "open/link.png"):
        assert refused(f"file://{tmp_path}/{name}", limits) == "image_url_not_allowed"
    assert refused(f"file://host{tmp_path}/open/a%20b.png", limits) == "image_url_not_allowed"
    for name in ("missing.png", "%00"):
        assert refused(f"file://{tmp_path}/open/{name}", limits) == "invalid_image"


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"type": "text", "text": 1}, "messages[0].content[0].text"),
        ({"type": "image_url", "image_url": {"url": 1}}, "messages[0].content[0].image_url.url"),
        ({"type": "image_url", "image_url": {"url": "", "detail": "tiny"}}, "messages[0].content[0].image_url.detail"),
        ({"type": "image_url"}, "messages[0].content[0].image_url"),
        ({"type": "video_url"}, "messages[0].content[0]"),
    ],
)
def test_an_error_names_the_field_of_a_part(part: dict[str, Any], place: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatRequest.parse(json.dumps({"messages": [{"role": "user", "content": [part]}]}).encode())
    assert caught.value.param == place
