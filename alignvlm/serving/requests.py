"""What a client asks, in OpenAI's form of `/v1/chat/completions`: checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator

from alignvlm.serving.web.errors import RequestError
from alignvlm.serving.web.limits import Limits
from data_pipeline.errors import did_you_mean
from data_pipeline.samples.schema import MAX_MESSAGES

MAX_PARTS = 256
"""Most parts of one message."""
MAX_VALUES = 100_000
"""Most values of a request. Millions of empty lists keep Python busy for seconds, in which it does nothing else."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)', re.DOTALL)
"""A string of JSON; one without an end goes to the end of the text, so that no character is looked at twice."""
LABELS = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")
"""Fields that say nothing about the answer: taken and left alone."""
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
"""Fields of OpenAI's that are not supported -> the values that ask for nothing."""


class _Form(BaseModel):
    """A JSON object of known fields; null is the same as leaving a field out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _told(cls, value: Any) -> Any:
        """The fields without nulls, and only the first unknown one: each error takes a kilobyte, times millions."""
        if not isinstance(value, dict):
            return value
        kept = {name: each for name, each in value.items() if each is not None}
        unknown = next((name for name in kept if name not in cls.model_fields), None)
        return {name: each for name, each in kept.items() if name in cls.model_fields or name == unknown}


class _ImageURL(_Form):
    url: str
    detail: Literal["auto", "high"] = "auto"


class _TextPart(_Form):
    type: Literal["text"]
    text: str


class _ImagePart(_Form):
    type: Literal["image_url"]
    image_url: _ImageURL


_Part = Annotated[_TextPart | _ImagePart, Field(discriminator="type")]


class _Message(_Form):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[_Part], FailFast()] = Field(min_length=1, max_length=MAX_PARTS)
    name: str = ""

    @model_validator(mode="before")
    @classmethod
    def _text_as_part(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("content"), str):
            return {**value, "content": [{"type": "text", "text": value["content"]}]}
        return value


class _StreamOptions(_Form):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ChatRequest(_Form):
    """A request's fields, as OpenAI has them."""

    model: str = ""
    messages: Annotated[list[_Message], FailFast()] = Field(min_length=1, max_length=MAX_MESSAGES)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field([], max_length=16)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {k: v for k, v in value.items() if k not in LABELS and v not in NEUTRAL.get(k, ())}
        for name in kept.keys() & NEUTRAL.keys():
            if kept[name] is not None:
                raise RequestError(f"{name} is not supported: leave it out", param=name, code="unsupported_parameter")
        return {**kept, "stop": [kept["stop"]]} if isinstance(kept.get("stop"), str) else kept

    @classmethod
    def parse(cls, body: bytes) -> ChatRequest:
        """Raises RequestError for what is not such a request."""
        if _has_too_many_values(body):
            raise RequestError(f"the request has more than {MAX_VALUES:,} values", code="request_too_large")
        try:
            return cls.model_validate_json(body)
        except ValidationError as error:
            raise _first_of(error) from error

    @property
    def most_tokens(self) -> int | None:
        """The longest answer, where the client says."""
        return self.max_completion_tokens or self.max_tokens

    def conversation(self, limits: Limits) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Messages as the processor takes them, and the URLs of images by their places. Text stays text.

        Raises:
            RequestError: too much of something.
        """
        messages = []
        urls: dict[str, str] = {}
        length = 0
        for number, message in enumerate(self.messages):
            parts: list[dict[str, str]] = []
            for place, part in enumerate(message.content):
                if isinstance(part, _TextPart):
                    length += len(part.text)
                    parts.append({"type": "text", "text": part.text})
                else:
                    urls[f"messages[{number}].content[{place}].image_url.url"] = part.image_url.url
                    parts.append({"type": "image"})
            messages.append({"role": {"developer": "system"}.get(message.role, message.role), "content": parts})
        if len(urls) > limits.max_images:
            raise RequestError(f"{len(urls)} images; at most {limits.max_images} are taken", param="messages")
        if length > limits.max_text:
            raise RequestError(
                f"the messages have {length:,} characters; at most {limits.max_text:,} are taken", param="messages"
            )
        return messages, urls


def _has_too_many_values(body: bytes) -> bool:
    """Whether JSON has more than MAX_VALUES of them, before any is made: by the commas outside of its strings."""
    commas = end = 0
    for number, string in enumerate(_STRING.finditer(body)):
        commas += body.count(b",", end, string.start())
        end = string.end()
        if commas > MAX_VALUES or number > 2 * MAX_VALUES:  # a value is one string, or two with its name
            return True
    return commas + body.count(b",", end) > MAX_VALUES


def _first_of(error: ValidationError) -> RequestError:
    """The first mistake that pydantic found, in a sentence."""
    found = error.errors(include_url=False, include_input=False)[0]
    place, loc = "", found["loc"]
    for number, step in enumerate(loc):
        if isinstance(step, int):
            place += f"[{step}]"
        elif number < 2 or loc[number - 2] != "content":  # what comes there is the kind of a part
            place += f".{step}" if place else str(step)
    if found["type"] == "json_invalid":
        return RequestError(f"the request is not JSON: {found['ctx']['error']}", code="invalid_json")
    if found["type"] == "extra_forbidden":
        name = str(found["loc"][-1])
        hint = did_you_mean(name, ChatRequest.model_fields) if len(found["loc"]) == 1 else ""
        message = f"unknown field {name[:80]!r}" + (f": {hint}" if hint else "")
        return RequestError(message, param=place[:200], code="unknown_parameter")
    said = found["msg"][:300]  # it may repeat what the client sent
    return RequestError(f"{place[:200]}: {said}" if place else said, param=place[:200] or None)
