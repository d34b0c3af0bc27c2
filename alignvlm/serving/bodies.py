"""The bytes of a request, within limits."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from alignvlm.serving.errors import RequestError
from alignvlm.serving.requests import Limits


async def read_body(request: Request, limits: Limits, content_type: str) -> bytes:
    """A request's bytes, as many as are allowed, of a type that a foreign web page cannot send without asking.

    Raises:
        RequestError: another type, too many bytes, or too slow. ClientDisconnect: the client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != content_type:
        raise RequestError(f"send the request as Content-Type: {content_type}", status=415)
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > limits.max_body:
                    raise RequestError(
                        f"the request is larger than {limits.max_body:,} bytes, the most that are taken; "
                        "send smaller images",
                        status=413,
                        code="request_too_large",
                        headers={"Connection": "close"},
                    )
    except TimeoutError as error:
        raise RequestError(
            f"the request did not arrive within {limits.body_seconds:g} s", status=408, headers={"Connection": "close"}
        ) from error
    return bytes(body)
