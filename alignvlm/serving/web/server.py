"""Serving an application until Ctrl-C: the address first, then the model, then requests."""

from __future__ import annotations

import ipaddress
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from alignvlm.errors import UserError
from alignvlm.serving.web.connections import LAST_SECONDS, Connection


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to this address; port 0 takes a free one. Raises UserError when it cannot be had."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"--host {host}: no address of this machine ({error.strerror})") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # who comes before the model is loaded waits
    except OSError as error:
        bound.close()
        raise UserError(f"--host {host} --port {port}: {error.strerror}; give another --port") from error
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine reaches the socket."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def address_of(bound: socket.socket) -> str:
    """The URL that clients on this machine use."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: ASGIApp, bound: socket.socket, stop: Callable[[], None]) -> None:
    """Answer requests until Ctrl-C or SIGTERM; `stop` is called then, so that what runs ends."""
    _Server(configuration(app), stop).run(sockets=[bound])
    print("stopped", file=sys.stderr)


def configuration(app: ASGIApp) -> uvicorn.Config:
    """How an application is served, whatever is done about signals."""
    return uvicorn.Config(
        app,
        http=Connection,
        backlog=64,  # accepted in one go, before any is counted
        log_config=None,
        log_level="error",
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=round(LAST_SECONDS) + 1,
    )


class _Server(uvicorn.Server):
    def __init__(self, config: Any, stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._stop = stop

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by uvicorn; the first signal also ends what runs."""
        self._stop()
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # uvicorn would raise it again at the end, and SIGTERM end the process unheard
