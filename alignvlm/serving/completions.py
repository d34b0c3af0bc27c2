"""`POST /v1/chat/completions`: from a request to its answer, whole or as a stream."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Send

from alignvlm.evaluation.items import Item
from alignvlm.serving.engine import Answer, Engine
from alignvlm.serving.generation import Outcome, Settings
from alignvlm.serving.images import decode_all, is_web, read_all
from alignvlm.serving.replies import END_OF_STREAM, Reply, event
from alignvlm.serving.requests import ChatRequest
from alignvlm.serving.web.errors import RequestError, hiding_failures
from alignvlm.serving.web.fetching import Fetcher
from alignvlm.serving.web.limits import Limits
from data_pipeline.samples.schema import SampleError

DEFAULT_TOKENS = 256
"""The longest answer where neither the client nor the export says one."""

MAX_CHARACTERS = 16
"""Most characters of text per token of the model's limit. More is refused unencoded: a megabyte takes seconds."""


class ChatCompletions:
    """Answers the body of a request; `Guarded` makes a route of it. Raises UserError for image hosts that are none."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        most_text = min(limits.max_text, MAX_CHARACTERS * engine.max_context)
        self._engine, self._limits = engine, replace(limits, max_text=most_text)
        self._fetcher = Fetcher(limits)

    async def __call__(self, body: bytes, send: Send) -> Response | None:
        engine = self._engine
        if engine.is_stopping:
            raise _stopping()
        asked = await engine.prepare(ChatRequest.parse, body)
        if asked.model not in ("", engine.name):
            raise RequestError(
                f"model {asked.model[:80]!r} is not here; this server has {engine.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )
        messages, urls = asked.conversation(self._limits)
        fetched = await self._fetcher.fetch({param: url for param, url in urls.items() if is_web(url)})
        inputs = await engine.prepare(self._prepare, messages, urls, fetched)
        answer = engine.answer(inputs, self._settings(asked, inputs["input_ids"].shape[1]))
        try:
            if not asked.stream:
                return JSONResponse(Reply(engine.name).whole(_whole(await answer.outcome())))
            await self._stream(answer, asked, send)
            return None
        finally:
            answer.cancel()  # nobody listens any more

    def _prepare(self, messages: list[dict[str, Any]], urls: dict[str, str], fetched: dict[str, bytes]) -> Any:
        """Inputs of the model. Raises RequestError for a conversation that cannot be asked."""
        images = decode_all(read_all(urls, fetched, self._limits), self._limits)
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
            with hiding_failures():
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


def _whole(outcome: Outcome) -> Outcome:
    """The outcome itself. Raises RequestError when the server's end cut it off."""
    if outcome.finish == "cancelled":
        raise _stopping()
    return outcome


def _stopping() -> RequestError:
    return RequestError("the server is stopping", status=503, code="stopping")
