"""Questions of the page to a model that another server has: vLLM, SGLang, or `alignvlm serve` elsewhere.

The browser asks this process only, so the other server needs no CORS, its key stays here, and one tunnel is enough.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from alignvlm.serving.bodies import read_body
from alignvlm.serving.errors import RequestError
from alignvlm.serving.requests import Limits
from data_pipeline.masking import mask

JSON = "application/json"
TIMEOUT = httpx.Timeout(10.0, read=600.0)
"""Seconds: to connect and to send; between two pieces of an answer, which a busy server makes wait."""


def relay_routes(server: str, api_key: str | None = None, limits: Limits | None = None) -> list[BaseRoute]:
    """`/v1/models` and `/v1/chat/completions` of another server.

    Args:
        server: its URL, without `/v1`.
        api_key: what it wants as `Authorization: Bearer …`.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    client = httpx.AsyncClient(base_url=server.rstrip("/"), headers=headers, timeout=TIMEOUT, trust_env=False)
    gone = f"{mask(server)} does not answer: is the model's server still running?"

    async def models(request: Request) -> Response:
        try:
            found = await client.get("/v1/models")
        except httpx.HTTPError:
            return _refused(RequestError(gone, 502))
        return Response(found.content, found.status_code, media_type=found.headers.get("content-type", JSON))

    async def completions(request: Request) -> Response:
        try:
            body = await read_body(request, limits or Limits(), JSON)
            asked = client.build_request("POST", "/v1/chat/completions", content=body, headers={"Content-Type": JSON})
            answer = await client.send(asked, stream=True)
        except RequestError as error:
            return _refused(error)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody is there
        except httpx.HTTPError:
            return _refused(RequestError(gone, 502))
        return StreamingResponse(
            _pieces(answer), answer.status_code, media_type=answer.headers.get("content-type", JSON)
        )

    return [Route("/v1/models", models), Route("/v1/chat/completions", completions, methods=["POST"])]


async def _pieces(answer: httpx.Response) -> AsyncIterator[bytes]:
    """The answer as it comes; when the page is left, the other server is too. What is cut off there is cut off here."""
    try:
        async for piece in answer.aiter_bytes():
            yield piece
    except httpx.HTTPError:
        return  # the page sees that no reason for the end came
    finally:
        await answer.aclose()


def _refused(error: RequestError) -> Response:
    return JSONResponse(error.body, error.status, error.headers)
