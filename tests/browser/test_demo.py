"""The demo page in a real browser: a tiny model answers and is looked into; a scripted server says the rest."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.items import Item
from alignvlm.evaluation.vocabulary_view import vocabulary_view
from alignvlm.serving.app import create_app
from alignvlm.serving.demo.app import PRIVATE, demo_routes
from alignvlm.serving.demo.examples import find_examples
from alignvlm.serving.demo.relay import relay_routes
from alignvlm.serving.engine import Engine
from alignvlm.serving.web.limits import Limits
from tests.browser.scripted import Scripted
from tests.fixtures.browser import OpenPage
from tests.fixtures.zoo import save
from tests.serving.server import running
from tests.tiny import picture, tiny_model
from tests.waiting import until

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser
LIMITS = Limits(max_body=400_000, max_images=3)
DROP = """([kind, files]) => {
    const data = new DataTransfer();
    for (const [name, type, content] of files)
        data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], name, { type }));
    const options = { dataTransfer: data, clipboardData: data, bubbles: true, cancelable: true };
    document.body.dispatchEvent(new { drop: DragEvent, paste: ClipboardEvent }[kind](kind, options));
}"""


def png(width: int, height: int, seed: int = 0) -> bytes:
    return save(picture(width, height, seed))


def upload(page: Page, *files: tuple[str, bytes]) -> None:
    """Choose files as a user does."""
    page.get_by_text("ready", exact=True).wait_for()
    chosen: list[Any] = [{"name": name, "mimeType": "image/png", "buffer": content} for name, content in files]
    page.locator("input[type=file]").set_input_files(chosen)


def ask(page: Page, question: str) -> None:
    page.get_by_label("Question", exact=True).fill(question)
    page.get_by_role("button", name="Ask").click()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})
    engine = Engine(ModelAnswerer(model, processor, "cpu"), "tiny")
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def address(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(create_app(engine, LIMITS, demo_routes("tiny", (), engine, LIMITS))) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    server = Scripted()
    yield server
    server.go.set()


@pytest.fixture
def relayed(scripted: Scripted) -> Iterator[str]:
    """The address of a page whose questions go to the scripted server."""
    with running(scripted.app) as port:
        routes = [*demo_routes("elsewhere", limits=LIMITS), *relay_routes(f"http://127.0.0.1:{port}", limits=LIMITS)]
        with running(create_app(None, routes=routes)) as own:
            yield f"http://127.0.0.1:{own}/"


def test_an_image_is_uploaded_and_the_models_answer_comes(address: str, engine: Engine, open_page: OpenPage) -> None:
    page = open_page(address)
    upload(page, ("page.png", png(70, 40)))
    page.get_by_text("Settings").click()
    page.get_by_label("Longest answer").fill("9")
    ask(page, "what is the total")
    page.locator(".answer[aria-busy=false]").wait_for()
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the total"}]}
    (expected,) = engine.answerer.answer([Item("", 0, "", [], [message], [picture(70, 40)])], 9)
    assert expected.split()
    assert page.locator(".answer").inner_text().split() == expected.split()
    assert page.get_by_role("status").inner_text().split() == ["Answer:", *expected.split()]
    assert page.get_by_label("Question", exact=True).input_value() == ""


def test_a_patch_shows_what_it_was_turned_into(address: str, engine: Engine, open_page: OpenPage) -> None:
    page = open_page(address)
    upload(page, ("page.png", png(64, 32)))
    cells = page.get_by_role("gridcell")
    cells.first.wait_for()
    view = vocabulary_view(engine.answerer.model, engine.answerer.processor, picture(64, 32))
    assert view is not None
    second_tile = view["tiles"][1]["cells"]
    assert cells.count() == len(view["tiles"]) * len(second_tile) == 32

    def told() -> list[list[str]]:
        return [row.split("\n") for row in page.locator("#patch li").all_inner_texts()]

    def expected(cell: dict[str, Any]) -> list[list[str]]:
        return [[text, f"{100 * weight:.1f} %"] for text, weight in cell["top"]]

    cells.nth(4).hover()  # the fifth in the first row of eight: the second tile's first
    page.get_by_role("heading", name="Patch in row 1, column 5").wait_for()
    assert told() == expected(second_tile[0])
    page.locator("h1").hover()
    page.get_by_role("heading", name="What the patches became").wait_for()
    assert told() == []
    cells.first.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.locator("h1").hover()
    until(lambda: told() == expected(second_tile[4]))  # what is chosen by the keyboard stays
    focused = page.locator(":focus").get_attribute("aria-label") or ""
    assert focused.startswith("Row 2, column 5: ")
    assert second_tile[4]["top"][0][0] in focused
    token = page.locator("#patch li button").first
    token.click()
    assert token.get_attribute("aria-pressed") == "true"
    opacity = cells.nth(12).locator("rect").evaluate("rect => Number(rect.style.fillOpacity)")
    assert opacity > 0, "the patch itself has the token"
    page.get_by_label("Show tokens").uncheck()
    assert page.locator("svg.overlay.heat").count() == 1


def test_answers_stream_and_can_be_stopped(relayed: str, scripted: Scripted, open_page: OpenPage) -> None:
    scripted.pieces = ["forty", None, "-two"]
    page = open_page(relayed)
    ask(page, "first")
    page.get_by_text("forty", exact=True).wait_for()
    assert page.locator(".answer").get_attribute("aria-busy") == "true"
    page.get_by_role("button", name="Stop").click()
    page.get_by_text("stopped", exact=True).wait_for()
    assert scripted.left.wait(60), "the model would go on for nobody"
    scripted.go.set()
    ask(page, "second")
    page.get_by_text("forty-two", exact=True).wait_for()
    page.get_by_role("button", name="Ask").wait_for()


def test_a_second_click_or_enter_neither_asks_again_nor_stops(
    relayed: str, scripted: Scripted, open_page: OpenPage
) -> None:
    scripted.pieces = ["forty", None, "-two"]
    page = open_page(relayed)
    page.get_by_text("ready", exact=True).wait_for()
    page.get_by_label("Question", exact=True).fill("first")
    page.get_by_role("button", name="Ask").dblclick()
    page.get_by_text("forty", exact=True).wait_for()
    page.get_by_role("button", name="Stop").dispatch_event("click", {"detail": 2})  # where it lies under the pointer
    page.get_by_label("Question", exact=True).fill("second")
    page.keyboard.press("Enter")
    assert page.get_by_label("Question", exact=True).input_value() == "second", "it waits for the first"
    scripted.go.set()
    page.get_by_text("forty-two", exact=True).wait_for()
    assert [asked["messages"][-1]["content"][-1]["text"] for asked in scripted.asked] == ["first"]


def test_a_question_is_asked_once_while_the_server_is_looked_for(
    relayed: str, scripted: Scripted, open_page: OpenPage
) -> None:
    page = open_page(relayed)
    page.get_by_text("ready", exact=True).wait_for()
    page.evaluate("document.getElementById('choice').replaceChildren()")  # as if it had not answered yet
    page.get_by_label("Question", exact=True).fill("only")
    page.evaluate("for (const i of [1, 2]) document.getElementById('form').requestSubmit()")
    page.locator(".answer[aria-busy=false]").wait_for()
    assert len(scripted.asked) == page.locator(".turn").count() == 1


def test_the_key_is_asked_for_until_it_fits(run_folder: Path, scripted: Scripted, open_page: OpenPage) -> None:
    examples = find_examples(run_folder / "3-instruct" / "export")
    with running(scripted.app) as port:
        routes = [*demo_routes("made up", examples), *relay_routes(f"http://127.0.0.1:{port}")]
        with running(create_app(None, routes=routes, api_key="secret", private=PRIVATE)) as own:
            page = open_page(f"http://127.0.0.1:{own}/")
            key = page.get_by_label("The key of this server")
            key.fill("guess")
            page.get_by_role("button", name="Open").click()
            page.get_by_role("alert").get_by_text("This is not the key").wait_for()
            key.fill("secret")
            page.keyboard.press("Enter")
            page.get_by_text("ready", exact=True).wait_for()
            assert not key.is_visible()
            assert page.get_by_role("alert").inner_text() == ""
            ask(page, "first")
            page.get_by_text("forty-two", exact=True).wait_for()
            pictures = page.get_by_role("region", name="Examples").locator("img")
            until(lambda: pictures.evaluate_all("all => all.every((image) => image.naturalWidth > 0)"))


def test_several_images_and_earlier_questions_go_along(relayed: str, scripted: Scripted, open_page: OpenPage) -> None:
    page = open_page(relayed)
    upload(page, ("a.png", png(20, 20)))
    content = base64.b64encode(png(30, 20, seed=1)).decode()
    page.evaluate(DROP, ["drop", [["b.png", "image/png", content]]])
    page.get_by_role("button", name="Image 2: b.png").wait_for()
    page.evaluate(DROP, ["paste", [["", "image/png", content]]])
    page.get_by_role("button", name="Image 3: The pasted image").wait_for()
    page.get_by_role("button", name="Remove").click()
    assert page.get_by_role("list", name="Images of the question").get_by_role("button").count() == 2
    for number, question in enumerate(("first", "second"), start=1):
        ask(page, question)
        until(lambda number=number: page.locator(".answer[aria-busy=false]").count() == number)
    first, second = scripted.asked
    assert first["model"] == "scripted"
    assert first["stream"]
    urls = [part["image_url"]["url"] for part in first["messages"][0]["content"][:-1]]
    assert [base64.b64decode(url.partition("base64,")[2]) for url in urls] == [png(20, 20), png(30, 20, seed=1)]
    assert second["messages"][0] == first["messages"][0]
    assert second["messages"][1:] == [
        {"role": "assistant", "content": "forty-two"},
        {"role": "user", "content": [{"type": "text", "text": "second"}]},
    ]
    page.get_by_role("button", name="New conversation").click()
    ask(page, "third")
    until(lambda: len(scripted.asked) == 3)
    assert len(scripted.asked[2]["messages"]) == 1


def test_files_that_cannot_be_used_are_named(relayed: str, scripted: Scripted, open_page: OpenPage) -> None:
    page = open_page(relayed)
    alert = page.get_by_role("alert")
    upload(page, ("good.png", png(8, 8)), ("broken.png", png(40, 40)[8:]))
    alert.get_by_text("broken.png cannot be read as an image").wait_for()
    alert.get_by_role("button", name="Close this message").click()
    upload(page, ("large.png", png(400, 400)))
    alert.get_by_text("large.png is too large: 0.5 MB").wait_for()
    upload(page, *((f"{i}.png", png(8, 8)) for i in range(3)))
    alert.get_by_text("2.png: a question takes at most 3 images").wait_for()
    assert page.locator(".stage img").get_attribute("alt") == "0.png", "what could be read is there"
    assert scripted.asked == []


def test_a_file_that_only_the_browser_can_read_is_named_too(address: str, open_page: OpenPage) -> None:
    page = open_page(address)
    upload(page, ("cut.png", png(40, 40)[:2000]))
    page.get_by_role("alert").get_by_text("cut.png: image cannot be decoded").wait_for()


def test_a_refusal_a_cut_answer_and_a_lost_server_are_said(
    relayed: str, scripted: Scripted, open_page: OpenPage
) -> None:
    page = open_page(relayed)
    alert = page.get_by_role("alert")
    scripted.error = (400, {"error": {"message": "this model takes 64 tokens"}})
    ask(page, "refused")
    alert.get_by_text("this model takes 64 tokens").wait_for()
    assert page.get_by_label("Question", exact=True).input_value() == "refused", "the question is kept"
    scripted.error, scripted.finish = None, None
    ask(page, "cut")
    alert.get_by_text("ended the answer before it was complete").wait_for()
    page.context.set_offline(True)
    ask(page, "lost")
    alert.get_by_text("The server does not answer").wait_for()


def test_markup_in_an_answer_stays_text_and_nothing_else_is_asked(
    relayed: str, scripted: Scripted, open_page: OpenPage
) -> None:
    markup = '<img src="https://example.org/x.png" onerror="document.title=1">'
    scripted.pieces = [markup]
    page = open_page(relayed)
    ask(page, markup)
    page.locator(".answer[aria-busy=false]").wait_for()
    assert page.locator(".answer").inner_text() == markup
    assert page.locator(".asked").inner_text() == markup


def test_examples_of_the_gallery_are_asked_on_a_phone(
    run_folder: Path, scripted: Scripted, open_page: OpenPage
) -> None:
    examples = find_examples(run_folder / "3-instruct" / "export")
    with running(scripted.app) as port:
        routes = [*demo_routes("made up", examples), *relay_routes(f"http://127.0.0.1:{port}")]
        with running(create_app(None, routes=routes)) as own:
            page = open_page(f"http://127.0.0.1:{own}/", viewport={"width": 375, "height": 700}, has_touch=True)
            cards = page.get_by_role("region", name="Examples").get_by_role("button")
            cards.first.wait_for()
            assert cards.count() == len(examples)
            cards.first.tap()
            page.locator(".answer[aria-busy=false]").wait_for()
            assert f"Expected: {examples[0].answers[0]}" in page.locator(".about").inner_text()
            (asked,) = scripted.asked
            assert asked["messages"][0]["content"][-1]["text"] == examples[0].question
            image = base64.b64decode(asked["messages"][0]["content"][0]["image_url"]["url"].partition("base64,")[2])
            assert image == examples[0].images[0].read_bytes()
            wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert wide == 0, "nothing to scroll sideways"
