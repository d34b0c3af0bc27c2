"""Questions of the page to a model that another server has: vLLM, SGLang, or `alignvlm serve` elsewhere.

The browser asks this process only, so the other server needs no CORS, its key stays here, and one tunnel is enough.
"""

from __future__ import annotations

import httpx2
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Send

from alignvlm.serving.web.errors import RequestError
from alignvlm.serving.web.guarded import Guarded
from alignvlm.serving.web.limits import Limits
from data_pipeline.masking import mask

JSON = "application/json"
SECONDS = 10.0
"""Seconds to connect, to send, and for the server to say which models it has."""
PATIENCE = httpx2.Timeout(SECONDS, read=600.0)
"""Seconds between two pieces of an answer, which a busy server makes wait."""


def relay_routes(server: str, api_key: str | None = None, limits: Limits | None = None) -> list[BaseRoute]:
    """`/v1/models` and `/v1/chat/completions` of another server.

    Args:
        server: its URL, without `/v1`.
        api_key: what it wants as `Authorization: Bearer …`.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    client = httpx2.AsyncClient(base_url=server.rstrip("/"), headers=headers, timeout=PATIENCE, trust_env=False)

    def gone() -> RequestError:
        return RequestError(f"{mask(server)} does not answer: is the model's server still running?", 502)

    async def models(request: Request) -> Response:
        try:
            found = await client.get("/v1/models", timeout=SECONDS)
        except httpx2.HTTPError:
            return gone().response()
        return Response(found.content, found.status_code, media_type=found.headers.get("content-type", JSON))

    async def completions(body: bytes, send: Send) -> None:
        asked = client.build_request("POST", "/v1/chat/completions", content=body, headers={"Content-Type": JSON})
        try:
            answer = await client.send(asked, stream=True)
        except httpx2.HTTPError as error:
            raise gone() from error
        try:
            await _pass_on(answer, send)
        finally:
            await answer.aclose()  # when the page is left, the other server is too

    guarded = Guarded(completions, JSON, limits or Limits())
    return [Route("/v1/models", models), Route("/v1/chat/completions", guarded, methods=["POST"])]


async def _pass_on(answer: httpx2.Response, send: Send) -> None:
    """The answer as it comes. What is cut off there is cut off here: the page sees that no reason for the end came."""
    kind = answer.headers.get("content-type", JSON).encode()
    await send({"type": "http.response.start", "status": answer.status_code, "headers": [(b"content-type", kind)]})
    try:
        async for piece in answer.aiter_bytes():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
    except httpx2.HTTPError:
        pass
    await send({"type": "http.response.body", "body": b""})
