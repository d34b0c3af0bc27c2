"""The routes of the demo page, examples from a gallery, and questions passed on to another server; no browser."""

from __future__ import annotations

import http.client
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from alignvlm.cli import build_parser
from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.vocabulary_view import vocabulary_view
from alignvlm.resources import resource
from alignvlm.serving.app import LOOPBACK, create_app
from alignvlm.serving.demo.app import BYTES, PRIVATE, demo_routes
from alignvlm.serving.demo.examples import MAX_EXAMPLES, find_examples
from alignvlm.serving.demo.relay import relay_routes
from alignvlm.serving.engine import Engine
from alignvlm.serving.web import server
from data_pipeline.files import read_json_lines, write_json_lines
from tests.fixtures.command import Command
from tests.fixtures.zoo import save
from tests.serving.server import ask, question, running
from tests.tiny import picture, tiny_model


def get(port: int, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    found = response.status, {name.lower(): value for name, value in response.headers.items()}, response.read()
    connection.close()
    return found


def engine_of(kind: str) -> Engine:
    model, processor = tiny_model(connector={"kind": kind})
    return Engine(ModelAnswerer(model, processor, "cpu"), "tiny")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = engine_of("align")
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    with running(create_app(engine, routes=demo_routes("tiny", (), engine), hosts=LOOPBACK)) as port:
        yield port


def test_the_page_is_whole_and_may_ask_nobody_else(port: int) -> None:
    status, headers, html = get(port, "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    pending, seen = re.findall(r'(?:src|href)="(demo/[^"]+)"', html.decode()), set()
    assert len(pending) == 4
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        status, headers, content = get(port, f"/{path}")
        assert (status, headers["x-content-type-options"]) == (200, "nosniff"), path
        if path.endswith(".js"):
            assert headers["content-type"].startswith("text/javascript")
            pending += [f"demo/page/{name}" for name in re.findall(r'from "\./([\w.]+)"', content.decode())]
        links = re.findall(r"https?://[^\s\"'`)]+", content.decode())
        assert set(links) <= {"http://www.w3.org/2000/svg"}, "a namespace is no address"
    pages = {path.name for path in resource("page").iterdir()}
    assert {path.rpartition("/")[2] for path in seen} == pages - {"index.html"} | {"report.css"}
    for path in ("/demo/page/missing.js", "/demo/page/..%2fapp.py", "/demo/examples/0/0"):
        status, _, content = get(port, path)
        assert status == 404
        assert json.loads(content)["error"]["message"]


def test_the_tokens_of_an_image_are_those_of_the_evaluation(port: int, engine: Engine) -> None:
    image = picture(64, 32)
    status, laid = ask(port, save(image), "/demo/vocabulary", Content_Type=BYTES)
    assert status == 200
    view = vocabulary_view(engine.answerer.model, engine.answerer.processor, image)
    assert view is not None
    assert (laid["entropy"], laid["vocabulary"]) == (view["entropy"], view["vocabulary"])
    assert laid["width"] == 2 * laid["height"]
    left, right = (tile["cells"] for tile in view["tiles"])
    by_place = {(cell["row"], cell["column"]): cell["top"] for cell in laid["cells"]}
    assert by_place == {
        (row, column): (left if column < 4 else right)[4 * row + column % 4]["top"]
        for row in range(4)
        for column in range(8)
    }
    assert {cell["x"] for cell in laid["cells"]} == {80.0 * column for column in range(8)}


def test_what_is_no_image_is_refused_in_one_line(port: int) -> None:
    status, body = ask(port, b"no image", "/demo/vocabulary", Content_Type=BYTES)
    assert status == 400
    assert "not an image of the formats" in body["error"]["message"]
    status, body = ask(port, b"{}", "/demo/vocabulary", Content_Type="text/plain")
    assert status == 415, "what a foreign page may send without asking"


def test_other_connectors_have_no_tokens_to_show() -> None:
    engine = engine_of("mlp")
    with running(create_app(engine, routes=demo_routes("tiny", (), engine))) as port:
        assert json.loads(get(port, "/demo/config.json")[2])["vocabulary"] is False
    engine.stop()


def test_examples_come_from_the_gallery_tasks_taking_turns(run_folder: Path) -> None:
    export = run_folder / "3-instruct" / "export"
    examples = find_examples(export)
    assert [example.task for example in examples[:4]] == ["fields", "tables", "fields", "tables"]
    assert len(examples) == 7, "every sample of the gallery"
    assert all(example.question and example.answers for example in examples)
    rows = run_folder / "3-instruct" / "evaluation" / "fields.jsonl"
    write_json_lines(rows, [row | {"images": ["../../../../secret.png"]} for row in read_json_lines(rows)])
    (run_folder.parents[1] / "secret.png").write_bytes(b"x")
    inside = find_examples(export)
    assert {example.task for example in inside} == {"tables"}
    assert len(inside) <= MAX_EXAMPLES
    with running(create_app(None, routes=demo_routes("run", inside))) as port:
        offered = json.loads(get(port, "/demo/config.json")[2])["examples"]
        status, headers, content = get(port, f"/{offered[1]['images'][0]}")
        assert (status, headers["content-type"]) == (200, "image/png")
        assert content == inside[1].images[0].read_bytes()
    assert find_examples(run_folder) == []


def test_with_a_key_the_page_opens_and_everything_else_wants_it(engine: Engine) -> None:
    routes = demo_routes("tiny", (), engine)
    with running(create_app(engine, routes=routes, api_key="secret", private=PRIVATE)) as port:
        for path in ("/", "/demo/page/main.js", "/health"):
            assert get(port, path)[0] == 200
        for path in ("/demo/config.json", "/v1/models", "/demo/examples/0/0", "/demo/%65xamples/0/0"):
            assert get(port, path)[0] == 401
            assert get(port, path, Authorization="Bearer secret")[0] in (200, 404)
        assert ask(port, b"no image", "/demo/vocabulary", Content_Type=BYTES)[0] == 401


def test_questions_are_passed_on_with_the_key_and_a_lost_server_is_said() -> None:
    async def models(request: Request) -> Response:
        return JSONResponse({"data": [{"id": "far"}], "key": request.headers.get("authorization")})

    async def completions(request: Request) -> Response:
        return JSONResponse({"error": {"message": "too long"}, "got": await request.json()}, 422)

    far = Starlette(routes=[Route("/v1/models", models), Route("/v1/chat/completions", completions, methods=["POST"])])
    with running(far) as address:
        routes = relay_routes(f"http://127.0.0.1:{address}", api_key="k")
        with running(create_app(None, routes=routes)) as port:
            assert json.loads(get(port, "/v1/models")[2]) == {"data": [{"id": "far"}], "key": "Bearer k"}
            assert ask(port, question("x")) == (422, {"error": {"message": "too long"}, "got": question("x")})
            assert ask(port, b"{}", Content_Type="text/plain")[0] == 415
    with running(create_app(None, routes=relay_routes(f"http://user:secret@127.0.0.1:{address}"))) as port:
        for status, body in (ask(port, question("x")), ask(port, None, "/v1/models", "GET")):
            assert status == 502
            assert "does not answer" in body["error"]["message"]
            assert "secret" not in body["error"]["message"]


@pytest.mark.parametrize(
    ("given", "key"),
    [
        (["tiny"], ""),
        (["--server", "http://me:password@127.0.0.1:9"], "secret"),
        (["tiny", "--server", "http://127.0.0.1:9"], ""),
    ],
)
def test_the_command_serves_what_it_was_given(
    given: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.chdir(tmp_path)
    for part in tiny_model():
        part.save_pretrained("tiny")
    served: list[Starlette] = []
    monkeypatch.setattr(server, "serve", lambda app, bound, stop: served.append(app))
    monkeypatch.setenv("ALIGNVLM_API_KEY", key)
    said = command("demo", *given, "--port", "0", "--device", "cpu")
    title = "tiny" if given[0] == "tiny" else "me:***@127.0.0.1:9"
    lines = rf"{re.escape(title)}: open http://127\.0\.0\.1:\d+ in a browser \(Ctrl-C ends it\)\n"
    assert re.fullmatch(lines + ("the page asks for the key that ALIGNVLM_API_KEY holds\n" if key else ""), said)
    with running(served[0]) as port:
        assert get(port, "/demo/config.json")[0] == (401 if key else 200)
        allowed = {"Authorization": f"Bearer {key}"}
        config = json.loads(get(port, "/demo/config.json", **allowed)[2])
        assert (config["title"], config["vocabulary"]) == (title, given[0] == "tiny")
        status, models = ask(port, None, "/v1/models", "GET", **allowed)
        if "--server" in given:
            assert status == 502, "nobody is there"
        else:
            assert [model["id"] for model in models["data"]] == ["tiny"]


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("http://a:8000", "http://a:8000"),
        ("http://a:8000/v1/", "http://a:8000"),
        ("https://h.example/vlm/v1", "https://h.example/vlm"),
    ],
)
def test_addresses_of_servers(given: str, taken: str) -> None:
    assert build_parser().parse_args(["demo", "--server", given]).server == taken
