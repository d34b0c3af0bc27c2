"""Turns as published datasets spell them, as messages: speakers, question and answer pairs, marks of images.

The importers and the reader of foreign shards call it. Our own `messages` are read by the stricter rules of schema.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from reprlib import repr as brief
from typing import Any

from data_pipeline.samples.schema import SampleError, normalise_messages

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Name of a speaker -> role."""
MARKS = (
    re.compile(r"<image>"),
    re.compile(r"<\|image\|>"),
    re.compile(r"<image (\d{1,4})>"),
    re.compile(r"\[IMG\]"),
)
"""Marks of an image's place. The first of these that a conversation uses is its mark, what spells another is text."""


def turn_messages(turns: Any) -> list[dict[str, Any]]:
    """Messages of a list of turns in any published spelling.

    {"role" or "from": speaker, "content" or "value": text}, pairs {"user": text, "assistant": text}, or plain texts,
    the user's first. Raises SampleError for anything else.
    """
    if not isinstance(turns, Sequence) or isinstance(turns, str | bytes) or not turns:
        raise SampleError(f"not a list of turns: {brief(turns)}")
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns):
        if isinstance(turn, str):
            messages.append({"role": ("user", "assistant")[number % 2], "content": turn})
        elif isinstance(turn, Mapping) and {"user", "assistant"} <= turn.keys():
            messages += [{"role": role, "content": turn[role]} for role in ("user", "assistant")]
        elif isinstance(turn, Mapping):
            speaker = turn.get("role") or turn.get("from")
            if not isinstance(speaker, str) or speaker.lower() not in ROLES:
                raise SampleError(f"turn {number} must be from {', '.join(ROLES)}: {brief(turn)}")
            messages.append({"role": ROLES[speaker.lower()], "content": turn.get("content", turn.get("value"))})
        else:
            raise SampleError(f"turn {number} is neither a text nor an object: {brief(turn)}")
    return messages


def pair_messages(questions: Any, answers: Any) -> list[dict[str, Any]]:
    """One conversation of questions and answers: two texts, or two lists of the same length. Raises SampleError."""
    if isinstance(questions, str):
        questions, answers = [questions], [answers]
    if not isinstance(questions, list) or not isinstance(answers, list) or len(questions) != len(answers):
        raise SampleError(f"questions and answers do not pair: {brief(questions)}, {brief(answers)}")
    return turn_messages([each for pair in zip(questions, answers, strict=True) for each in pair])


def row_messages(row: Mapping[str, Any], num_images: int) -> tuple[list[dict[str, Any]], set[str]]:
    """The conversation of a foreign shard's JSON, and the fields it was made from. Raises SampleError.

    `conversations` as LLaVA has them, `texts` (turns or pairs), `queries` and `annotations`, `question` and `answer`.
    """
    if "conversations" in row:
        return place_images(turn_messages(row["conversations"]), num_images), {"conversations"}
    if "texts" in row:
        if row.get("media") not in (None, "image", "text"):
            raise SampleError(f"its media are {brief(row['media'])}, not images")
        return place_images(turn_messages(row["texts"]), num_images), {"texts", "media", "name"}
    for question, answer in (("queries", "annotations"), ("question", "answer")):
        if question in row and answer in row:
            return place_images(pair_messages(row[question], row[answer]), num_images), {question, answer}
    return [], set()


def place_images(messages: Sequence[Mapping[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """Messages whose texts are cut at the marks of images, normalised; without a mark all images come first.

    "First" is in front of the first text of the user. Contents that are lists with image parts stay as they are.

    Raises:
        SampleError: more or fewer marks than images, numbered marks out of turn, or messages that are none.
    """
    if any(_has_image_part(message) for message in messages):
        return normalise_messages(list(messages), num_images)
    texts = [text for message in messages if isinstance(text := message.get("content"), str)]
    marks = MARKS if num_images else MARKS[:1]
    mark = next((each for each in marks if any(each.search(text) for text in texts)), None)
    if mark is not None:
        _check_numbers([match for text in texts for match in mark.finditer(text)])
        placed = [{**message, "content": _cut(message.get("content"), mark)} for message in messages]
    elif num_images:
        placed = _in_front(messages, num_images)
    else:
        placed = [{**message, "content": _parts(message.get("content"))} for message in messages]
    return normalise_messages(placed, num_images)


def check_answers(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raises SampleError when normalised messages have no answer, or an empty one."""
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    if not answers:
        raise SampleError("no answer: the conversation has no assistant turn")
    for number, parts in enumerate(answers):
        if not any(part["type"] == "text" and part["text"].strip() for part in parts):
            raise SampleError(f"answer {number} is empty")


def _has_image_part(message: Mapping[str, Any]) -> bool:
    content = message.get("content")
    return isinstance(content, list) and any(isinstance(p, Mapping) and p.get("type") == "image" for p in content)


def _check_numbers(marks: list[re.Match[str]]) -> None:
    numbers = [int(mark[1]) for mark in marks if mark.re.groups]
    if numbers and numbers != list(range(1, len(numbers) + 1)):
        raise SampleError(f"numbered marks of images are not 1 to {len(numbers)} in turn: {brief(numbers)}")


def _parts(content: Any) -> Any:
    """A text as a list of parts; what is none is left to `normalise_messages`."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


def _cut(content: Any, mark: re.Pattern[str]) -> Any:
    if not isinstance(content, str):
        return content
    parts, begin = [], 0
    for match in mark.finditer(content):
        parts += [*_parts(content[begin : match.start()]), {"type": "image"}]
        begin = match.end()
    return parts + _parts(content[begin:])


def _in_front(messages: Sequence[Mapping[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """All images in front of the user's first text. Raises SampleError when the user says nothing."""
    first = next((number for number, message in enumerate(messages) if message.get("role") == "user"), None)
    if first is None:
        raise SampleError(f"{num_images} image(s) without a mark, and no user turn to put them in front of")
    placed = [{**message, "content": _parts(message.get("content"))} for message in messages]
    if isinstance(placed[first]["content"], list):
        placed[first]["content"] = [{"type": "image"}] * num_images + placed[first]["content"]
    return placed
