"""Where a server reads images from: the request; a web server or folder only by name, and nothing beyond it."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from alignvlm.errors import UserError
from alignvlm.serving.images import read_all
from alignvlm.serving.requests import ChatRequest
from alignvlm.serving.web.errors import RequestError
from alignvlm.serving.web.fetching import Fetcher
from alignvlm.serving.web.limits import Limits
from tests.fixtures.zoo import save
from tests.tiny import picture
from tests.web import web_server


@pytest.fixture(scope="module")
def page() -> bytes:
    return save(picture(20, 20))


@pytest.fixture(scope="module")
def web(page: bytes) -> Iterator[int]:
    """The port of a web server with /page.png, /away, which sends on to it, and /drip, which never ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response({"/away": 302, "/missing": 404}.get(self.path, 200))
            self.send_header("Location", f"http://localhost:{self.server.server_port}/page.png")  # type: ignore[attr-defined]
            self.end_headers()
            try:
                while self.path == "/drip":
                    self.wfile.write(b"x")
                    time.sleep(0.02)
                self.wfile.write(page)
            except OSError:
                pass  # the asker has left

    with web_server(Handler) as port:
        yield port


def fetched(limits: Limits, *urls: str) -> list[bytes]:
    return list(asyncio.run(Fetcher(limits).fetch({str(i): url for i, url in enumerate(urls)})).values())


def not_fetched(limits: Limits, *urls: str) -> str:
    """Why the last of them is refused: its code and message."""
    with pytest.raises(RequestError) as caught:
        fetched(limits, *urls)
    assert (caught.value.status, caught.value.param) == (400, str(len(urls) - 1))
    return f"{caught.value.code}: {caught.value.message}"


def test_a_web_server_is_asked_only_by_its_name(web: int, page: bytes) -> None:
    url, limits = f"http://127.0.0.1:{web}/page.png", Limits(image_hosts=(f"127.0.0.1:{web}",))
    assert fetched(limits, url) == [page]
    for hosts in ((), ("127.0.0.1",), (f"127.0.0.1:{web + 1}",)):  # without a port only those of http: and https:
        assert "image_url_not_allowed" in not_fetched(Limits(image_hosts=hosts), url)
    for other in ("localhost", "127.0.0.1@localhost", "me@127.0.0.1", "127.0.0.1.example", "2130706433"):
        assert "image_url_not_allowed" in not_fetched(limits, url.replace("127.0.0.1", other))
    assert "status 302" in not_fetched(limits, f"http://127.0.0.1:{web}/away")
    assert "status 404" in not_fetched(limits, f"http://127.0.0.1:{web}/missing")


@pytest.mark.parametrize("named", ["LOCALHOST:{}", "localhost.:{}", "[::ffff:127.0.0.1]:{}"])
def test_hosts_are_compared_as_names_not_as_they_are_spelt(named: str, web: int, page: bytes) -> None:
    host = named.format(web)
    for url in (f"http://{host}/page.png", f"HTTP://{host.lower()}/page.png"):
        assert fetched(Limits(image_hosts=(host,)), url) == [page]


@pytest.mark.parametrize("host", ["http://a.example", "a/b", "a:", "me@a", ""])
def test_what_is_no_host_is_said(host: str) -> None:
    with pytest.raises(UserError, match="give HOST or HOST:PORT"):
        Fetcher(Limits(image_hosts=(host,)))


def test_a_name_that_begins_to_mean_this_machine_is_not_followed(web: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in ("127.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1", "0.0.0.0"):
        monkeypatch.setattr(socket, "getaddrinfo", lambda *args, a=address, **more: [(2, 1, 6, "", (a, web))])
        said = not_fetched(Limits(image_hosts=(f"images.example:{web}",)), f"http://images.example:{web}/page.png")
        assert "images.example leads to" in said


def test_all_images_of_a_request_have_one_time_and_one_size(web: int, page: bytes) -> None:
    host = f"127.0.0.1:{web}"
    url = f"http://{host}/page.png"
    begun = time.monotonic()
    limits = Limits(image_hosts=(host,), fetch_seconds=0.3)
    assert "within 0.3 s" in not_fetched(limits, url, f"http://{host}/drip")
    assert time.monotonic() - begun < 10
    limits = Limits(image_hosts=(host,), max_body=2 * len(page) + 1)
    assert fetched(limits, url, url) == [page, page]
    assert "image_too_large" in not_fetched(limits, url, url, url)


def test_too_many_images_are_refused_before_the_first_is_read() -> None:
    part = {"type": "image_url", "image_url": {"url": "file:///missing"}}
    asked = ChatRequest.parse(json.dumps({"messages": [{"role": "user", "content": [part] * 3}]}).encode())
    with pytest.raises(RequestError, match="3 images; at most 2 are taken"):
        asked.conversation(Limits(max_images=2))


def read(url: str, limits: Limits) -> bytes:
    return read_all({"p": url}, {}, limits)["p"]


def refused(url: str, limits: Limits) -> str | None:
    with pytest.raises(RequestError) as caught:
        read(url, limits)
    assert (caught.value.status, caught.value.param) == (400, "p")
    return caught.value.code


def test_files_are_read_in_one_folder_only(tmp_path: Path, page: bytes) -> None:
    (tmp_path / "open").mkdir()
    for name in ("open/a b.png", "secret.png"):
        (tmp_path / name).write_bytes(page)
    (tmp_path / "open" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "open" / "circle.png").symlink_to(tmp_path / "open" / "circle.png")
    limits = Limits(image_folder=tmp_path / "open")
    url = f"file://{tmp_path}/open/a%20b.png"
    assert read(url, limits) == page
    assert refused(url, Limits()) == "image_url_not_allowed"
    for name in ("secret.png", "open/../secret.png", "open/%2e%2e/secret.png", "open/link.png"):
        assert refused(f"file://{tmp_path}/{name}", limits) == "image_url_not_allowed"
    assert refused(f"file://host{tmp_path}/open/a%20b.png", limits) == "image_url_not_allowed"
    for name in ("missing.png", "circle.png", "%00"):
        assert refused(f"file://{tmp_path}/open/{name}", limits) == "invalid_image"
    small = Limits(image_folder=tmp_path / "open", max_body=len(page))
    assert read_all({"0": url}, {}, small) == {"0": page}
    for fetched_before in ({}, {"0": page}):
        with pytest.raises(RequestError, match="the most for all images"):
            read_all({"0": url, "1": url}, fetched_before, small)


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
