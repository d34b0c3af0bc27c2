"""A web server on loopback, in a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        """Nothing is said: clients of tests leave early."""


@contextmanager
def web_server(handler: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """The port of a server whose requests such a handler answers; nothing is logged."""
    quiet = type("Quiet", (handler,), {"log_message": lambda *arguments: None})
    with Server(("127.0.0.1", 0), quiet) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()
