"""Conversations to text: flattening, the chat template, and which characters are supervised."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alignvlm.model.inputs.prelude import without_prelude
from data_pipeline.samples.schema import SampleError, check_role, check_text

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Used when a tokenizer has no template."""

IMAGE = "<image>"
"""Placeholder of one image in the text; becomes the image's visual tokens."""

Escape = Callable[[str], str]
"""Makes a text safe from being read as control tokens (`tokenizer.ControlTokens.escape`); `str` leaves it as it is."""


def flatten(messages: Sequence[Mapping[str, Any]], escape: Escape) -> list[dict[str, str]]:
    """Message contents as strings, each image as one `<image>` and all text escaped; role and order are kept.

    Raises:
        SampleError: an unknown role, of which a template might make a control token, or a text that is not Unicode.
    """
    return [
        {"role": check_role(message, number), "content": _flat(message["content"], escape)}
        for number, message in enumerate(messages)
    ]


def render_prompt(tokenizer: Any, messages: Sequence[Mapping[str, Any]], escape: Escape = str) -> str:
    """The conversation so far with the assistant's turn opened. Raises SampleError when the template refuses it."""
    return _render(tokenizer, [flatten(messages, escape)], add_generation_prompt=True)[0]


def render_supervised(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], escape: Escape = str
) -> tuple[str, list[tuple[int, int]]]:
    """A whole conversation and the character spans that the assistant said, end-of-turn tokens included.

    A span runs from the end of the opened prompt to the end of the turn, both measured by rendering prefixes of the
    conversation, in two calls for all of them: no knowledge of the template is needed.

    Raises:
        SampleError: there is no assistant turn or nothing before it, or the template refuses the conversation or
            renders a prefix of it differently from the beginning of the whole.
    """
    flat = flatten(messages, escape)
    turns = [i for i, message in enumerate(flat) if message["role"] == "assistant"]
    if not turns:
        raise SampleError("no supervised token: the conversation has no assistant turn")
    ends = [i + 1 for i in turns] + ([] if flat[-1]["role"] == "assistant" else [len(flat)])
    said = _render(tokenizer, [flat[:end] for end in ends])
    text = said[-1]
    prompts = _render(tokenizer, [flat[:i] for i in turns], add_generation_prompt=True)
    spans = []
    for i, prompt, turn in zip(turns, prompts, said, strict=False):
        if not (text.startswith(turn) and turn.startswith(prompt)):
            raise SampleError(
                f"turn {i}: the chat template changes earlier text when a turn is added; "
                "set model.language.chat_template to one that only appends"
            )
        spans.append((len(prompt), len(turn.rstrip())))
    return text, spans


def _flat(content: str | Sequence[Mapping[str, Any]], escape: Escape) -> str:
    """A message's content as one string; in a content that is a string already, `<image>` marks an image."""
    if isinstance(content, str):
        texts = content.split(IMAGE)
    else:
        texts = [""]
        for part in content:
            if part["type"] == "image":
                texts.append("")
            else:
                texts[-1] += part["text"]
    return IMAGE.join(escape(check_text(text)) for text in texts)


def _render(tokenizer: Any, conversations: list[list[dict[str, str]]], **options: Any) -> list[str]:
    if not all(conversations):
        raise SampleError("the assistant has the first turn: there is nothing that it answers")
    template = tokenizer.chat_template
    if isinstance(template, str):  # contents are text here: the prelude would only take time, a sixth of `measure`
        options["chat_template"] = without_prelude(template)
    try:
        return tokenizer.apply_chat_template(conversations, tokenize=False, **options)
    except Exception as error:  # a template is a program of its own: it may raise anything
        reason = " ".join(str(error).split())
        raise SampleError(f"the chat template refuses the conversation: {type(error).__name__}: {reason}") from error
