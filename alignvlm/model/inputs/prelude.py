"""Chat templates that take messages of parts: what stands in front of a language model's own template.

A language model's template wants text. Hugging Face's and OpenAI's messages hold lists of parts, text and images. The
prelude turns such contents into text, every image as `<image>`, as `chat.flatten` does; contents that are text already
stay as they are, so that a template renders them as it did.
"""

from __future__ import annotations

from functools import lru_cache

_BEGIN = "{#- alignvlm: lists of parts become text, with <image> for every image. -#}\n"
_END = "{#- alignvlm: here the language model's own template begins. #}\n"
"""Ends without a minus sign: white space at the beginning of the own template stays."""

_PRELUDE = (
    _BEGIN
    + """\
{%- if messages | map(attribute="content") | reject("string") | list -%}
  {%- set flat = namespace(messages=[]) -%}
  {%- for message in messages -%}
    {%- if message["content"] is undefined or message["content"] is none or message["content"] is string -%}
      {%- set flat.messages = flat.messages + [message] -%}
    {%- else -%}
      {%- set said = namespace(text="") -%}
      {%- for part in message["content"] -%}
        {%- if part["type"] == "text" -%}
          {%- set said.text = said.text + part["text"] -%}
        {%- elif part["type"] in ("image", "image_url") -%}
          {%- set said.text = said.text + "<image>" -%}
        {%- else -%}
          {{- raise_exception("a message has a part of type '" ~ part["type"] ~ "', neither text nor image") -}}
        {%- endif -%}
      {%- endfor -%}
      {%- set flat.messages = flat.messages + [dict(message, content=said.text)] -%}
    {%- endif -%}
  {%- endfor -%}
  {%- set messages = flat.messages -%}
{%- endif -%}
"""
    + _END
)

Template = str | dict[str, str]
"""A chat template, or several by name."""


def with_prelude(template: Template) -> Template:
    """The template with this version's prelude in front, in place of any that is there."""
    if isinstance(template, dict):
        return {name: _PRELUDE + _own(text) for name, text in template.items()}
    return _PRELUDE + _own(template)


def without_prelude(template: Template) -> Template:
    """The language model's own template."""
    return {name: _own(text) for name, text in template.items()} if isinstance(template, dict) else _own(template)


@lru_cache(maxsize=16)
def _own(template: str) -> str:
    return template.partition(_END)[2] if template.startswith(_BEGIN) else template
