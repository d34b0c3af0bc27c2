"""The prelude before a chat template: messages of parts render as their flattened text, text as it ever did."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from alignvlm.model.inputs.chat import flatten
from alignvlm.model.inputs.prelude import with_prelude, without_prelude
from tests.fixtures.chat_templates import CHAT_TEMPLATES

WORDS = {"bos_token": "<s>", "eos_token": "</s>"}
ODD = {
    "line break first": "\n  {% if messages %}{{ messages[0].content }}{% endif %}\n",
    "blanks before a block": "   {% for m in messages %}{{ m.content }}{% endfor %}  ",
    "blanks before a value": "  {{ messages[0]['content'] }}",
    "comment first": "{# mine #}\n\n{{- messages[0]['content'] }}",
    "in a macro": "{% macro all() %}{% for m in messages %}[{{ m.content }}]{% endfor %}{% endmacro %}{{ all() }}",
    "sets messages": "{% if messages %}{% set messages = messages[1:] %}{% endif %}{{ messages[0].content }}",
}  # fmt: skip


def render(template: str, messages: Any, **options: Any) -> str:
    return render_jinja_template([messages], chat_template=template, **options, **WORDS)[0][0]


def text(said: str) -> dict[str, str]:
    return {"type": "text", "text": said}


def conversation(roles: tuple[str, ...]) -> list[dict[str, Any]]:
    """All kinds of contents; the images carry what users write there."""
    image, linked = {"type": "image", "path": "a.png"}, {"type": "image_url", "image_url": {"url": "https://x/b.png"}}
    first = [{"role": "system", "content": [text("Read "), text("well. ")]}] if "system" in roles else []
    return [
        *first,
        {"role": "user", "content": [text(" Compare "), image, linked, text(" <b>{{ 1 }}</b>\n")]},
        {"role": "assistant", "content": "The <image> second."},
        {"role": "user", "content": [text("Why?")]},
    ]


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_parts_render_as_flattened_text(name: str) -> None:
    template = CHAT_TEMPLATES[name]
    messages = conversation(template.roles)
    ours = [
        {"role": m["role"], "content": m["content"] if isinstance(m["content"], str) else
         [{"type": "image"} if part["type"] == "image_url" else part for part in m["content"]]}
        for m in messages
    ]  # fmt: skip
    flat = flatten(ours, str)
    for options in ({}, {"add_generation_prompt": True}):
        expected = render(template.text, flat, **options)
        assert expected.count("<image>") == 3
        assert render(with_prelude(template.text), messages, **options) == expected
        assert render(with_prelude(template.text), flat, **options) == expected
    assert without_prelude(with_prelude(with_prelude(template.text))) == template.text


@pytest.mark.parametrize("name", ODD)
def test_the_own_template_begins_as_if_alone(name: str) -> None:
    messages = conversation(("system",))
    flat = [m | {"content": "x" if m["content"] == [] else "y"} for m in messages]
    assert render(with_prelude(ODD[name]), flat) == render(ODD[name], flat)
    parts = [m | {"content": [text(m["content"])]} for m in flat]
    assert render(with_prelude(ODD[name]), parts) == render(ODD[name], flat)


def test_messages_keep_their_other_fields_and_may_lack_a_content() -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.name }}:{{ m.content is defined }};{% endfor %}"
    messages = [{"role": "user", "name": "Ada", "content": [text("x")]}, {"role": "assistant", "name": "Max"}]
    assert render(with_prelude(template), messages) == "user:Ada:True;assistant:Max:False;"


def test_other_parts_are_refused() -> None:
    messages = [{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]
    with pytest.raises(Exception, match="a part of type 'video', neither text nor image"):
        render(with_prelude("{{ messages[0].content }}"), messages)


def test_several_templates_by_name() -> None:
    named = {"default": "{{ messages[0].content }}", "tools": "{{ tools }}"}
    both = with_prelude(named)
    assert render(both["default"], [{"role": "user", "content": [{"type": "image"}]}]) == "<image>"
    assert without_prelude(both) == named
