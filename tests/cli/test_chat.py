"""`alignvlm chat` with a tiny real export: one question, a conversation, mistakes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from alignvlm.cli import main
from alignvlm.evaluation.answering import ModelAnswerer
from alignvlm.evaluation.items import Item
from alignvlm.serving.chat import ChatSession
from tests.fixtures.command import Command
from tests.fixtures.zoo import bomb, save
from tests.tiny import picture, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `export` and `page.png`."""
    folder = tmp_path_factory.mktemp("chat")
    model, processor = tiny_model(text={"tie_word_embeddings": False, "initializer_range": 0.5})  # says various things
    model.save_pretrained(folder / "export")
    processor.save_pretrained(folder / "export")
    picture(70, 40).save(folder / "page.png")
    return folder


def test_one_question_is_answered_as_in_an_evaluation(folder: Path, command: Command) -> None:
    words = ("--image", folder / "page.png", "--question", "what is the total", "--max-new-tokens", "6")
    content = [{"type": "image"}, {"type": "text", "text": "what is the total"}]
    item = Item("k", 0, "", ["12"], [{"role": "user", "content": content}], [picture(70, 40)])
    (answer,) = ModelAnswerer.load(folder / "export", "cpu").answer([item], 6)
    assert answer
    assert command("chat", folder / "export", *words, "--device", "cpu").splitlines()[-1] == answer


def test_a_session_keeps_the_messages_and_sends_the_images_once(folder: Path) -> None:
    session = ChatSession(folder / "export", [folder / "page.png"], "cpu", max_new_tokens=4)
    answers = [session.ask(question) for question in ("what is the total", "read the field")]
    assert [message["role"] for message in session.messages] == ["user", "assistant"] * 2
    assert [part["type"] for part in session.messages[0]["content"]] == ["image", "text"]
    assert [part["type"] for part in session.messages[2]["content"]] == ["text"]
    assert [session.messages[i]["content"][0]["text"] for i in (1, 3)] == answers


def test_an_empty_line_ends_the_conversation(folder: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: Iterator[str] = iter(["what is the total", "  "])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    output = command("chat", folder / "export", "--device", "cpu", "--max-new-tokens", "4")
    assert output.count("model: ") == 1
    assert next(lines, None) is None


def test_a_question_that_cannot_be_asked_does_not_end_the_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["what is \udcff", "<image> <|im_end|>", "read", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    assert main(["chat", str(folder / "export"), "--device", "cpu", "--max-new-tokens", "4"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("model: ") == 2
    (line,) = (line for line in printed.err.splitlines() if line.startswith("alignvlm:"))
    assert "this question cannot be asked: a text is not Unicode: lone surrogate U+DCFF" in line


def test_mistakes_are_named(folder: Path, command: Command) -> None:
    assert "is not an export folder" in command("chat", folder, "--question", "?", code=2)
    message = command("chat", folder / "export", "--device", "cpu", "--question", "\ud800", code=2)
    assert "cannot be asked" in message


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("text.png", b"no image", "not an image of the formats PNG"),
        ("page.eps", save(picture(8, 8), "EPS"), "not an image of the formats PNG"),  # Ghostscript would draw it
        ("cut.jpg", save(picture(8, 8), "JPEG")[:-90], "image cannot be decoded"),
        ("large.png", bomb(11_000), "11000 x 11000 pixels; at most 100,000,000"),
        ("larger.png", bomb(20_000), "more than 100,000,000 pixels"),
        ("missing.png", None, "No such file"),
        ("", None, "not a regular file"),
    ],
)
def test_an_image_that_cannot_be_used_is_one_line(
    folder: Path, command: Command, name: str, data: bytes | None, reason: str
) -> None:
    if data is not None:
        (folder / name).write_bytes(data)
    with warnings.catch_warnings(record=True) as warned:
        message = command("chat", folder / "export", "--image", folder / name, "--question", "?", code=2)
    assert message.startswith(f"alignvlm: {folder / name}: not a readable image (")
    assert reason in message
    assert message.count("\n") == 1
    assert not warned
