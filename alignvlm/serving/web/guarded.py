"""A route that takes a request's body and works on it: how much, how long, and what the client hears of errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from alignvlm.serving.web.errors import RequestError, hiding_failures
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
        self._answer, self._places = answer, _Places(limits.max_requests)
        self._bodies = _Bodies(content_type, limits)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response: Response | None
        try:
            with hiding_failures():
                self._places.check()  # before anything is taken from the client
                body = await self._bodies.read(scope, receive)
                with self._places.taken():
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


class _Bodies:
    """Reads the bodies of requests.

    When too many are arriving, the one that began first is given up: a slow client's, whoever else comes.
    """

    def __init__(self, content_type: str, limits: Limits) -> None:
        self._content_type, self._limits = content_type, limits
        self._arriving: list[asyncio.Timeout] = []

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """A request's bytes, as many as are allowed.

        Raises:
            RequestError: another type, too many bytes, or too slow. ClientDisconnect: the client went away.
        """
        headers, limits = Headers(scope=scope), self._limits
        if headers.get("content-type", "").partition(";")[0].strip().lower() != self._content_type:
            raise RequestError(f"send the request as Content-Type: {self._content_type}", status=415)
        promised = headers.get("content-length", "")
        if promised.isdecimal():
            self._check(int(promised))
        body, is_whole = bytearray(), False
        try:
            async with asyncio.timeout(limits.body_seconds) as deadline, self._among(deadline):
                while not is_whole:
                    async with asyncio.timeout(limits.silent_seconds):
                        message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    body += message.get("body", b"")
                    self._check(len(body))
                    is_whole = not message.get("more_body", False)
        except TimeoutError as error:
            raise RequestError(
                f"the request did not arrive: it may take {limits.body_seconds:g} s in all and send nothing for "
                f"{limits.silent_seconds:g} s, or less while many others arrive",
                status=408,
            ) from error
        return bytes(body)

    def _check(self, size: int) -> None:
        if size > self._limits.max_body:
            raise RequestError(
                f"the request is larger than {self._limits.max_body:,} bytes, the most that are taken; "
                "send smaller images",
                status=413,
                code="request_too_large",
            )

    @asynccontextmanager
    async def _among(self, deadline: asyncio.Timeout) -> AsyncIterator[None]:
        """The deadline of one body, among those of the others."""
        self._arriving.append(deadline)
        try:
            if len(self._arriving) > self._limits.max_arriving:
                first = self._arriving.pop(0)
                if not first.expired():
                    first.reschedule(asyncio.get_running_loop().time())
            yield
        finally:
            if deadline in self._arriving:
                self._arriving.remove(deadline)


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
