"""Errors of a request, in the shape that clients of OpenAI's API know."""

from __future__ import annotations

from typing import Any


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
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        """What the client gets."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
