"""Evaluation items of held-out samples: one per assistant turn, with the reference answers of earlier turns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from data_pipeline.samples.schema import Sample, SampleError, check_text


@dataclass(frozen=True)
class Item:
    """One question to the model."""

    key: str
    """Key of the sample."""
    turn: int
    """Number of the assistant turn in its sample, from 0."""
    question: str
    """Text of the last user message before the turn."""
    answers: list[str]
    """Accepted answers, at least one."""
    messages: list[dict[str, Any]]
    """Everything before the turn; earlier answers are the reference ones."""
    images: list[Image.Image]
    """The images of `messages`, in order."""


def spread(num_samples: int, count: int) -> list[int]:
    """Numbers of up to `count` samples, evenly over all of them: the same ones whoever asks."""
    count = min(count, num_samples)
    return [i * num_samples // count for i in range(count)]


def items_of(sample: Sample) -> list[Item]:
    """Every assistant turn of a sample as an item; later turns never see the model's own earlier answers.

    The accepted answers are `meta["answers"]`: a list of strings for the last turn, or one list per assistant turn.
    A turn without them is compared with its own text.

    Raises:
        SampleError: there is no assistant turn, or an accepted answer is not Unicode.
    """
    turns = [i for i, message in enumerate(sample.messages) if message["role"] == "assistant"]
    if not turns:
        raise SampleError("the conversation has no assistant turn: nothing is asked")
    items = []
    for number, position in enumerate(turns):
        before = sample.messages[:position]
        num_images = sum(part["type"] == "image" for message in before for part in message["content"])
        items.append(
            Item(
                key=sample.key,
                turn=number,
                question=next((_text(m) for m in reversed(before) if m["role"] == "user"), ""),
                answers=_answers(sample.meta.get("answers"), number, len(turns)) or [_text(sample.messages[position])],
                messages=before,
                images=sample.images[:num_images],
            )
        )
    return items


def _answers(answers: Any, turn: int, num_turns: int) -> list[str]:
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        return []
    if all(isinstance(answer, str) for answer in answers):
        return [check_text(answer) for answer in answers] if turn == num_turns - 1 else []
    if len(answers) == num_turns and isinstance(answers[turn], Sequence) and not isinstance(answers[turn], str):
        return [check_text(str(answer)) for answer in answers[turn]]
    return []


def _text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text").strip()
