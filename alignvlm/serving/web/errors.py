"""Errors of a request, in the shape that clients of OpenAI's API know."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

logger = logging.getLogger(__name__)


class RequestError(Exception):
    """A request that is not answered.

    Args:
        message: what is wrong, and what to do.
        status: of HTTP.
        param: the field of the request.
        code: a word for programs.
        headers: of the response.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The body with its status and headers."""
        return JSONResponse(self.body, self.status, self.headers)


@contextmanager
def hiding_failures() -> Iterator[None]:
    """Whatever a request makes fail here, as a RequestError that says nothing of the server's inside; the log does."""
    try:
        yield
    except (RequestError, ClientDisconnect):
        raise
    except Exception as error:
        logger.exception("a request failed")
        if _is_out_of_memory(error):
            raise RequestError("no memory for this request: send less", status=500, code="out_of_memory") from error
        raise RequestError(
            "the request failed inside the server; its log says more", status=500, code="internal_error"
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    torch = sys.modules.get("torch")  # a server before another one computes nothing itself
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return isinstance(error, MemoryError)
    torch.cuda.empty_cache()
    return True
