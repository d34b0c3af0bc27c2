"""A server with OpenAI's API that says what a test tells it, when the test lets it."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class Scripted:
    """Answers with `pieces`; behind a piece that is None it waits until `go` is set."""

    def __init__(self) -> None:
        self.pieces: list[str | None] = ["forty", "-two"]
        self.error: tuple[int, Any] | None = None
        """Status and JSON of an answer that is refused."""
        self.finish: str | None = "stop"
        self.go = threading.Event()
        self.left = threading.Event()
        """Set when an asker went away before the end."""
        self.asked: list[dict[str, Any]] = []
        self.app = Starlette(
            routes=[Route("/v1/models", self._models), Route("/v1/chat/completions", self._answer, methods=["POST"])]
        )

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "scripted"}]})

    async def _answer(self, request: Request) -> Response:
        self.asked.append(json.loads(await request.body()))
        if self.error is not None:
            return JSONResponse(self.error[1], self.error[0])
        return StreamingResponse(self._events(), media_type="text/event-stream")

    async def _events(self) -> AsyncIterator[str]:
        try:
            for piece in self.pieces:
                while piece is None and not self.go.is_set():
                    await asyncio.sleep(0.01)
                if piece is not None:
                    yield self._event({"content": piece}, None)
            if self.finish is not None:
                yield self._event({}, self.finish)
                yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left.set()
            raise

    def _event(self, delta: dict[str, str], finish: str | None) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta, 'finish_reason': finish}]})}\n\n"
