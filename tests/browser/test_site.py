"""The documentation's site in a real browser: it asks nobody else, and its search works, also from a disk."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.test_project_files import ROOT, make
from tests.web import web_server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def site() -> Path:
    made = make("docs")
    assert made.returncode == 0, made.stdout + made.stderr
    return ROOT / "build" / "site"


@pytest.fixture(params=["disk", "server"])
def address(site: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """Where the site begins."""
    if request.param == "disk":
        yield site.as_uri()
        return

    class Files(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(site))

    with web_server(Files) as port:
        yield f"http://127.0.0.1:{port}"


def test_the_search_finds_a_setting_and_nothing_is_fetched_from_elsewhere(address: str, browser: Browser) -> None:
    context = browser.new_context()
    page = context.new_page()
    asked, failed = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failed.append(str(error)))
    page.on("console", lambda message: failed.append(message.text) if message.type == "error" else None)
    page.goto(f"{address}/index.html")
    page.keyboard.press("/")
    page.get_by_placeholder("Search").fill("max_bad_steps")
    page.get_by_role("option").filter(has_text="Every setting").first.click()
    page.wait_for_url(f"{address}/settings.html*")
    assert page.get_by_role("heading", name="resilience").first.is_visible()
    page.goto(f"{address}/api/extending.html")
    assert page.get_by_role("heading", name="on_step").first.is_visible()
    context.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:", "about:"))] == []
    assert failed == []
