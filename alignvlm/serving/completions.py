"""`POST /v1/chat/completions`: from a request to its answer, whole or as a stream, and what goes wrong between."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from alignvlm.evaluation.items import Item
from alignvlm.serving.bodies import read_body
from alignvlm.serving.engine import Answer, Engine
from alignvlm.serving.errors import RequestError
from alignvlm.serving.generation import Outcome, Settings
from alignvlm.serving.replies import END_OF_STREAM, Reply, event
from alignvlm.serving.requests import ChatRequest, Limits
from data_pipeline.samples.schema import SampleError

logger = logging.getLogger(__name__)

DEFAULT_TOKENS = 256
"""The longest answer where neither the client nor the export says one."""


class ChatCompletions:
    """The route as an ASGI application."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with self._admitted():
                await self._answer(Request(scope, receive), send)
        except ClientDisconnect:
            pass
        except RequestError as error:
            await JSONResponse(error.body, error.status, error.headers)(scope, receive, send)

    @asynccontextmanager
    async def _admitted(self) -> AsyncIterator[None]:
        if self._engine.is_stopping:
            raise _stopping()
        if self._num_requests >= self._limits.max_requests:
            raise RequestError(
                f"{self._num_requests} requests are answered or wait already: try again later",
                status=503,
                code="overloaded",
                headers={"Retry-After": "5"},
            )
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    async def _answer(self, request: Request, send: Send) -> None:
        asked = ChatRequest.parse(await read_body(request, self._limits, "application/json"))
        if asked.model not in ("", self._engine.name):
            raise RequestError(
                f"model {asked.model[:80]!r} is not here; this server has {self._engine.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        inputs = await self._engine.prepare(self._prepare, asked)
        answer = self._engine.answer(inputs, self._settings(asked, inputs["input_ids"].shape[1]))
        async with _while_connected(request.receive, answer.cancel):
            if asked.stream:
                await self._stream(answer, asked, send)
            else:
                with _failures():
                    outcome = await answer.outcome()
                reply = Reply(self._engine.name).whole(_whole(outcome))
                await JSONResponse(reply)(request.scope, request.receive, send)

    def _prepare(self, asked: ChatRequest) -> Any:
        """Inputs of the model. Raises RequestError for a conversation that cannot be asked."""
        messages, images = asked.conversation(self._limits)
        try:
            return self._engine.answerer.prepare([Item("", 0, "", [], messages, images)])
        except SampleError as error:
            raise RequestError(str(error), param="messages") from error

    def _settings(self, asked: ChatRequest, prompt_tokens: int) -> Settings:
        """How to answer a prompt of that length. Raises RequestError when there is no room for the answer."""
        wanted = asked.most_tokens
        usual = self._engine.answerer.model.generation_config.max_new_tokens or DEFAULT_TOKENS
        most = self._engine.max_context
        if prompt_tokens + (wanted or 1) > most:
            raise RequestError(
                f"this model takes {most:,} tokens; the prompt has {prompt_tokens:,}, images included, and "
                f"{wanted or 1:,} were wanted as an answer",
                param="messages",
                code="context_length_exceeded",
            )
        return Settings(
            wanted or min(usual, most - prompt_tokens), asked.temperature, asked.top_p, asked.seed, tuple(asked.stop)
        )

    async def _stream(self, answer: Answer, asked: ChatRequest, send: Send) -> None:
        reply = Reply(self._engine.name)
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]

        async def say(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await say(reply.chunk({"role": "assistant", "content": ""}))
        try:
            with _failures():
                async for piece in answer:
                    await say(reply.chunk({"content": piece}))
                outcome = await answer.outcome()
            _whole(outcome)
            await say(reply.chunk({}, outcome.finish))
            if asked.stream_options.include_usage:
                await say(reply.last_chunk(outcome))
        except RequestError as error:  # too late for a status
            await say(event(error.body))
        await say(END_OF_STREAM, more=False)


@asynccontextmanager
async def _while_connected(receive: Receive, cancel: Callable[[], None]) -> AsyncIterator[None]:
    """Calls `cancel` when the client goes away, and at the end."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
        cancel()


@contextmanager
def _failures() -> Iterator[None]:
    """Whatever the model raises, as a RequestError that says nothing of the server's inside."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise RequestError("no memory for this request: send less", status=500, code="out_of_memory") from error
    except Exception as error:
        logger.exception("a request failed")
        raise RequestError("the model failed; the server's log says more", status=500, code="internal_error") from error


def _whole(outcome: Outcome) -> Outcome:
    """The outcome itself. Raises RequestError when the server's end cut it off."""
    if outcome.finish == "cancelled":
        raise _stopping()
    return outcome


def _stopping() -> RequestError:
    return RequestError("the server is stopping", status=503, code="stopping")
