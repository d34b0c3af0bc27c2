"""The server's routes as an ASGI application, and who may ask it. Other pages come in through `routes`."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from pathlib import PurePosixPath

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from alignvlm.serving.completions import ChatCompletions
from alignvlm.serving.engine import Engine
from alignvlm.serving.web.errors import RequestError
from alignvlm.serving.web.guarded import Guarded
from alignvlm.serving.web.limits import Limits

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names under which a client on this machine knows a server that only this machine reaches."""


def create_app(
    engine: Engine | None,
    limits: Limits | None = None,
    routes: Sequence[BaseRoute] = (),
    hosts: Sequence[str] | None = None,
    api_key: str | None = None,
    private: Sequence[str] = ("/v1",),
) -> Starlette:
    """`/v1/chat/completions`, `/v1/models`, `/health`, and whatever else is given.

    Args:
        engine: the model; a route of your own computes with it by `await engine.run(function, …)`. None: `routes` have
            `/v1` themselves, from elsewhere.
        routes: of Starlette, for example a `Mount` of static files; they come after the server's own.
        hosts: names by which the server may be called; without them any. Those of a server on loopback keep web pages
            out that give it a name of their own (DNS rebinding).
        api_key: what clients must send as `Authorization: Bearer …`; None lets all in.
        private: paths that want the key, with everything below them.

    Raises:
        UserError: a host of `limits.image_hosts` is none.
    """

    async def health(request: Request) -> Response:
        is_stopping = engine is not None and engine.is_stopping
        return JSONResponse({"status": "stopping" if is_stopping else "ok"}, 503 if is_stopping else 200)

    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.scope['path'][:80]}: {error.detail}"
        return RequestError(message, status=error.status_code, headers=error.headers).response()

    async def fail(request: Request, error: Exception) -> Response:  # the log has its traceback
        return RequestError("the server failed; its log says more", status=500, code="internal_error").response()

    app = Starlette(
        routes=[
            *([] if engine is None else _api(engine, limits or Limits())),
            Route("/health", health),
            *routes,
        ],
        middleware=[Middleware(_Door, hosts=hosts, api_key=api_key, private=private)],
        exception_handlers={HTTPException: refuse, Exception: fail},
    )
    app.router.redirect_slashes = False  # it would send the client to whatever host it has named
    return app


def _api(engine: Engine, limits: Limits) -> list[BaseRoute]:
    async def models(request: Request) -> Response:
        entry = {"id": engine.name, "object": "model", "created": engine.loaded_at, "owned_by": "alignvlm"}
        return JSONResponse({"object": "list", "data": [{**entry, "max_model_len": engine.max_context}]})

    completions = Guarded(ChatCompletions(engine, limits), "application/json", limits)
    return [Route("/v1/chat/completions", completions, methods=["POST"]), Route("/v1/models", models)]


class _Door:
    """Lets in who may ask."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str] | None, api_key: str | None, private: Sequence[str]) -> None:
        self._app, self._hosts, self._key = app, hosts, api_key
        self._private = [PurePosixPath(path) for path in private]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["type"] == "http":
                self._check(Headers(scope=scope), scope["path"])
        except RequestError as error:
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._hosts is not None and name.lower() not in self._hosts:
            raise RequestError(
                f"this server is called {self._hosts[0]}, not {name[:80]!r}: start it with --host to be reached "
                "under other names",
                status=403,
            )
        if self._key is None or not any(map(PurePosixPath(path).is_relative_to, self._private)):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
            raise RequestError(
                "this server wants its key as Authorization: Bearer …",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
