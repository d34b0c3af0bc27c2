"""The server over HTTP: answers equal evaluation's, streams arrive as they are made, and nobody blocks the others."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from alignvlm.cli.serving.serve import api_key
from alignvlm.errors import UserError
from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.items import Item
from alignvlm.serving.app import LOOPBACK, create_app
from alignvlm.serving.engine import Engine
from alignvlm.serving.requests import ChatRequest
from alignvlm.serving.web.errors import RequestError
from alignvlm.serving.web.limits import Limits
from tests.serving.server import ask, data_url, head, question, running, stream
from tests.tiny import picture, tiny_model
from tests.waiting import until

TEXT = "what is the total"


@pytest.fixture(scope="module")
def answerer() -> ModelAnswerer:
    """A model that says various things and never ends by itself."""
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})
    answerer = ModelAnswerer(model, processor, "cpu")
    answerer.stop_ids = []
    return answerer


@pytest.fixture(scope="module")
def engine(answerer: ModelAnswerer) -> Engine:
    return Engine(answerer, "tiny", max_context=600)


@pytest.fixture(scope="module")
def port(engine: Engine) -> Iterator[int]:
    limits = Limits(max_requests=4, max_body=400_000, max_images=2, max_pixels=20_000)
    own = Route("/page", lambda request: PlainTextResponse('"a page of one\'s own"'))
    with running(create_app(engine, limits, routes=[own], hosts=LOOPBACK)) as port:
        yield port


def expected(answerer: ModelAnswerer, tokens: int, *images: Any, text: str = TEXT) -> str:
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": text}]
    return answerer.answer([Item("k", 0, "", [], [{"role": "user", "content": content}], list(images))], tokens)[0]


def test_answers_are_those_of_an_evaluation(port: int, answerer: ModelAnswerer) -> None:
    images = [picture(70, 40), picture(20, 30, seed=1)]
    status, reply = ask(port, question(TEXT, *images, max_tokens=9, model="tiny"))
    assert status == 200
    (choice,) = reply["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected(answerer, 9, *images), "refusal": None}
    assert choice["finish_reason"] == "length"
    assert reply["usage"]["completion_tokens"] == 9
    visual = sum(answerer.visual_tokens(*image.size) for image in images)
    assert visual < reply["usage"]["prompt_tokens"] < visual + 20


def test_a_connector_with_a_part_of_the_vocabulary_answers_likewise() -> None:
    text = {"tie_word_embeddings": False, "initializer_range": 0.5}
    answerer = ModelAnswerer(*tiny_model({"num_active": 40}, text), "cpu")
    with running(create_app(Engine(answerer, "part"))) as port:
        _, reply = ask(port, question(TEXT, picture(70, 40), max_tokens=9))
    assert reply["choices"][0]["message"]["content"] == expected(answerer, 9, picture(70, 40)) != ""


def test_a_stream_is_the_same_answer_piece_by_piece(port: int, answerer: ModelAnswerer) -> None:
    body = question(TEXT, picture(70, 40), max_tokens=40, stream_options={"include_usage": True})
    first, *pieces, last, counts = stream(port, body)
    assert first["choices"][0]["delta"]["role"] == "assistant"
    said = [piece["choices"][0]["delta"]["content"] for piece in pieces]
    assert "".join(said) == expected(answerer, 40, picture(70, 40))
    assert len(said) > 10
    assert last["choices"][0]["finish_reason"] == "length"
    assert counts["usage"]["completion_tokens"] == 40
    assert len({event["id"] for event in (first, *pieces, last, counts)}) == 1


def test_text_that_spells_an_image_or_a_control_token_stays_text(port: int, answerer: ModelAnswerer) -> None:
    text = "<image> <|im_end|>"
    _, reply = ask(port, {"messages": [{"role": "user", "content": text}], "max_tokens": 5})
    assert reply["choices"][0]["message"]["content"] == expected(answerer, 5, text=text)


def test_draws_follow_their_seed(port: int) -> None:
    body = question(TEXT, max_tokens=12, temperature=1.5, seed=7)
    texts = [
        ask(port, body | change)[1]["choices"][0]["message"]["content"]
        for change in ({}, {}, {"seed": 8}, {"top_p": 1e-9})
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == ask(port, question(TEXT, max_tokens=12))[1]["choices"][0]["message"]["content"]


def test_an_answer_ends_before_a_stop_text_and_nothing_of_it_is_streamed(port: int, answerer: ModelAnswerer) -> None:
    whole = expected(answerer, 40)
    stop = whole[len(whole) // 2 :][:3]
    for texts in (stop, ["never said", stop]):
        body = question(TEXT, max_tokens=40, stop=texts)
        choice = ask(port, body)[1]["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (whole[: whole.index(stop)], "stop")
        pieces = [event["choices"][0]["delta"].get("content", "") for event in stream(port, body)]
        assert "".join(pieces) == choice["message"]["content"]


@pytest.mark.parametrize("streams", [True, False])
def test_who_goes_away_frees_the_model(port: int, engine: Engine, streams: bool) -> None:
    passes: list[float] = []

    def count(*unused: Any) -> None:
        passes.append(time.monotonic())
        time.sleep(0.01)

    hook = engine.answerer.model.register_forward_pre_hook(count)
    body = json.dumps(question(TEXT, max_tokens=500, stream=streams)).encode()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(head("/v1/chat/completions", len(body)) + body)
            until(lambda: len(passes) > 3)
        asyncio.run(engine.run(int))  # when the model is free
    finally:
        hook.remove()
    assert len(passes) < 250


def test_requests_wait_their_turn_and_too_many_are_told_to_come_back(port: int, engine: Engine) -> None:
    begun, release = threading.Event(), threading.Event()
    engine._model.submit(lambda: (begun.set(), release.wait(60)))
    assert begun.wait(20)
    replies: list[int] = []
    threads = [
        threading.Thread(target=lambda: replies.append(ask(port, question(TEXT, max_tokens=1))[0])) for _ in range(5)
    ]
    try:
        for thread in threads:
            thread.start()
        until(lambda: replies)
        assert replies == [503]  # four wait
        assert ask(port, None, "/health", "GET") == (200, {"status": "ok"})
    finally:
        release.set()
    for thread in threads:
        thread.join(30)
    assert sorted(replies) == [200] * 4 + [503]


IMAGE = data_url(picture(30, 30))
HELLO = [{"role": "user", "content": "hi"}]


def with_image(url: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "not JSON"),
        ([], 400, "object"),
        ({}, 400, "messages"),
        ({"messages": HELLO, "model": "other"}, 404, "this server has 'tiny'"),
        ({"messages": HELLO, "max_tokns": 3}, 400, "did you mean 'max_tokens'"),
        ({"messages": HELLO, "n": 2}, 400, "n is not supported"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools is not supported"),
        ({"messages": HELLO, "temperature": 3}, 400, "temperature"),
        ({"messages": HELLO, "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": HELLO, "max_tokens": 600}, 400, "takes 600 tokens"),
        ({"messages": [{"role": "user", "content": "a " * 2000}]}, 400, "takes 600 tokens"),
        ({"messages": [{"role": "user", "content": "a" * 9601}]}, 400, "at most 9,600"),
        ({"messages": [{"role": "assistant", "content": "hi"}], "stop": [""]}, 400, "stop[0]"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, 400, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "messages[0].content[0]"),
        (with_image("http://127.0.0.1:1/a.png"), 400, "fetches no such URL"),
        (with_image("file:///etc/hostname"), 400, "opens no such file"),
        (with_image("/etc/hostname"), 400, "opens no such file"),
        (with_image("data:image/png;base64,@@@"), 400, "not base64"),
        (with_image("data:image/png;base64,aGVsbG8="), 400, "cannot be decoded"),
        (with_image(data_url(picture(200, 101))), 400, "20,200 pixels"),
        (question("hi", *[picture(9, 9)] * 3), 400, "3 images; at most 2"),
        ({"messages": HELLO, "metadata": [0] * 110_000}, 400, "more than 100,000 values"),
        (b" " * 400_001, 413, "larger than 400,000 bytes"),
        ({"messages": [{"role": "user", "content": [0] * 300}]}, 400, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "x" * 9999}]}]}, 400, "Input tag"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_sentence_in_openais_shape(port: int, body: Any, status: int, said: str) -> None:
    got, reply = ask(port, body)
    assert (got, list(reply)) == (status, ["error"]), reply
    assert set(reply["error"]) == {"message", "type", "param", "code"}
    assert reply["error"]["type"] == "invalid_request_error"
    assert said in reply["error"]["message"]
    assert len(reply["error"]["message"]) < 500


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("[0" + ", []" * 100_000 + "]}", "more than 100,000 values"),
        ('{"' + '":0,"' * 100_000 + '":0}}', "more than 100,000 values"),
        ('"' * 500_000, "more than 100,000 values"),
        ('"' + '\\",' * 200_000, "not JSON"),
        ('"' + '\\",' * 200_000 + "\\", "not JSON"),
    ],
    ids=["lists", "names", "strings", "no end", "half an escape"],
)
def test_values_are_counted_and_not_the_commas_of_a_text(labels: str, said: str) -> None:
    content = '1,"2",' * 100_000
    text = json.dumps({"messages": [{"role": "user", "content": content}]})
    assert ChatRequest.parse(text.encode()).conversation(Limits())[0][0]["content"][0]["text"] == content
    with pytest.raises(RequestError, match=said):
        ChatRequest.parse(f'{text[:-1]}, "metadata": {labels}'.encode())


def test_fields_that_ask_for_nothing_are_taken(port: int) -> None:
    fields = {
        "n": 1,
        "user": "me",
        "presence_penalty": 0.0,
        "tools": None,
        "response_format": {"type": "text"},
        "seed": None,
    }
    assert ask(port, {"messages": HELLO, "max_completion_tokens": 1, **fields})[0] == 200


def test_other_paths_hosts_and_content_types(port: int) -> None:
    for path in ("/v1/nothing", "/v1/models/", "/v1/%00", "/v1/../v1/models", "//v1/models"):
        assert ask(port, None, path, "GET")[0] == 404
    assert ask(port, None, method="GET")[0] == 405
    assert ask(port, {"messages": HELLO}, Content_Type="text/plain")[0] == 415  # what any web page may send
    status, reply = ask(port, None, "/v1/models", "GET", Host="rebound.example")
    assert (status, reply["error"]["type"]) == (403, "invalid_request_error")
    assert ask(port, None, "/v1/models", "GET")[1]["data"][0]["id"] == "tiny"
    assert ask(port, None, "/page", "GET") == (200, "a page of one's own")


def test_with_a_key_only_who_has_it_asks(engine: Engine) -> None:
    with running(create_app(engine, api_key="secret")) as port:
        assert ask(port, None, "/health", "GET")[0] == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            assert ask(port, None, "/v1/models", "GET", **headers)[0] == 401
        assert ask(port, None, "/v1/models", "GET", Authorization="Bearer secret")[0] == 200


def test_a_key_that_no_header_holds_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, taken in (("", None), ("s3cret!", "s3cret!")):
        monkeypatch.setenv("ALIGNVLM_API_KEY", key)
        assert api_key() == taken
    for key in (" ", "two words", "line\n", "schlüssel"):
        monkeypatch.setenv("ALIGNVLM_API_KEY", key)
        with pytest.raises(UserError, match="ALIGNVLM_API_KEY: give letters"):
            api_key()


@pytest.mark.parametrize("error", [RuntimeError("a kernel"), MemoryError("a kernel")])
@pytest.mark.parametrize("part", ["prepare", "generate"])
def test_a_model_that_fails_fails_one_request(
    part: str,
    error: Exception,
    port: int,
    answerer: ModelAnswerer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as broken:
        broken.setattr(answerer, part, fail)
        status, reply = ask(port, {"messages": HELLO})
        if part == "generate":
            (*_, last) = stream(port, {"messages": HELLO})
            assert last == reply
    assert (status, reply["error"]["type"]) == (500, "server_error")
    assert reply["error"]["code"] == ("out_of_memory" if isinstance(error, MemoryError) else "internal_error")
    assert "kernel" not in json.dumps(reply)
    assert "a kernel" in caplog.text
    assert ask(port, {"messages": HELLO, "max_tokens": 1})[0] == 200
