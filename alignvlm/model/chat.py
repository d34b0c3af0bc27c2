"""Conversations to text: flattening, the chat template, and which characters are supervised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_pipeline.samples.schema import SampleError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Used when a tokenizer has no template."""

IMAGE = "<image>"
"""Placeholder of one image in the text; becomes the image's visual tokens."""


def flatten(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Message contents as strings, each image part as one `<image>`; role and order are kept."""
    flat = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(IMAGE if part["type"] == "image" else part["text"] for part in content)
        flat.append({"role": message["role"], "content": content})
    return flat


def render_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The conversation so far with the assistant's turn opened."""
    return tokenizer.apply_chat_template(flatten(messages), tokenize=False, add_generation_prompt=True)


def render_supervised(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
    """A whole conversation and the character spans that the assistant said, end-of-turn tokens included.

    A span runs from the end of the opened prompt to the end of the turn, both measured by rendering prefixes of the
    conversation: no knowledge of the template is needed.

    Raises:
        SampleError: when the template renders a prefix differently from the beginning of the whole.
    """
    flat = flatten(messages)
    text = tokenizer.apply_chat_template(flat, tokenize=False)
    spans = []
    for i, message in enumerate(flat):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(flat[:i], tokenize=False, add_generation_prompt=True)
        last = i + 1 == len(flat)
        turn = text if last else tokenizer.apply_chat_template(flat[: i + 1], tokenize=False)
        if not (text.startswith(turn) and turn.startswith(prompt)):
            raise SampleError(
                f"turn {i}: the chat template changes earlier text when a turn is added; "
                "set model.language.chat_template to one that only appends"
            )
        spans.append((len(prompt), len(turn.rstrip())))
    return text, spans
