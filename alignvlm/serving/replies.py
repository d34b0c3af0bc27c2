"""Answers in OpenAI's form: one JSON object, or chunks of a stream of server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from alignvlm.serving.generation import Outcome

END_OF_STREAM = b"data: [DONE]\n\n"


class Reply:
    """What is the same in all parts of one answer."""

    def __init__(self, model: str) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """A `chat.completion`."""
        message = {"role": "assistant", "content": outcome.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": outcome.finish}
        return self._object("chat.completion", [choice]) | {"usage": usage(outcome)}

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> bytes:
        """An event with a `chat.completion.chunk`."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return event(self._object("chat.completion.chunk", [choice]))

    def last_chunk(self, outcome: Outcome) -> bytes:
        """The event with the counts, which comes after the choice has ended."""
        return event(self._object("chat.completion.chunk", []) | {"usage": usage(outcome)})

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}


def usage(outcome: Outcome) -> dict[str, int]:
    """Counts of tokens; those of a prompt include the visual ones."""
    return {
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "total_tokens": outcome.prompt_tokens + outcome.completion_tokens,
    }


def event(content: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"
