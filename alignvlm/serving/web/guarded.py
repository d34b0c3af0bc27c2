"""A route that takes a request's body and works on it: how much, how long, and what the client hears of errors."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from alignvlm.serving.web.errors import RequestError, failures
from alignvlm.serving.web.limits import Limits

Answer = Callable[[bytes, Send], Coroutine[Any, Any, Response | None]]
"""Takes a request's body; gives the response, or None when it has sent one itself."""


class Guarded:
    """An ASGI application around a function that answers.

    Args:
        answer: cancelled when the client goes away; a RequestError of it is the response.
        content_type: of the body; one that a foreign web page cannot send without asking.
        limits: its numbers of requests are counted here.
    """

    def __init__(self, answer: Answer, content_type: str, limits: Limits) -> None:
        self._answer, self._content_type, self._limits = answer, content_type, limits
        self._arriving, self._answered = _Places(limits.max_arriving), _Places(limits.max_requests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response | None
        try:
            with failures():
                self._answered.check()  # before anything is taken from the client
                with self._arriving.taken():
                    body = await read_body(scope, receive, self._limits, self._content_type)
                with self._answered.taken():
                    response = await _while_connected(receive, self._answer(body, send))
        except ClientDisconnect:
            return
        except RequestError as error:
            response = error.response()
        if response is not None:
            await response(scope, receive, send)


class _Places:
    """A number of requests that may be at it at a time."""

    def __init__(self, most: int) -> None:
        self._most, self._num_taken = most, 0

    def check(self) -> None:
        """Raises RequestError when no place is free."""
        if self._num_taken >= self._most:
            raise RequestError(
                f"{self._num_taken} requests are answered or wait already: try again later",
                status=503,
                code="overloaded",
                headers={"Retry-After": "5"},
            )

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Takes one of the places. Raises RequestError as `check`."""
        self.check()
        self._num_taken += 1
        try:
            yield
        finally:
            self._num_taken -= 1


async def read_body(scope: Scope, receive: Receive, limits: Limits, content_type: str) -> bytes:
    """A request's bytes, as many as are allowed.

    Raises:
        RequestError: another type, too many bytes, or too slow. ClientDisconnect: the client went away.
    """
    headers = Headers(scope=scope)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != content_type:
        raise RequestError(f"send the request as Content-Type: {content_type}", status=415)
    body, is_whole = bytearray(), False
    promised = headers.get("content-length", "")
    try:
        async with asyncio.timeout(limits.body_seconds):
            while not is_whole:
                if max(len(body), int(promised) if promised.isdecimal() else 0) > limits.max_body:
                    raise RequestError(
                        f"the request is larger than {limits.max_body:,} bytes, the most that are taken; "
                        "send smaller images",
                        status=413,
                        code="request_too_large",
                    )
                message = await asyncio.wait_for(receive(), limits.silent_seconds)
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                is_whole = not message.get("more_body", False)
    except TimeoutError as error:
        raise RequestError(
            f"the request did not arrive: it may take {limits.body_seconds:g} s in all, and send nothing for "
            f"{limits.silent_seconds:g} s",
            status=408,
        ) from error
    return bytes(body)


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, Response | None]) -> Response | None:
    """What the work gives. Raises ClientDisconnect when the client goes away; the work is cancelled then."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, watching = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        watching.cancel()
        await asyncio.wait((working, watching))
