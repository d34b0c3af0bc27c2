"""Connections whose clients keep up: one that sends half a request, or does not read its answer, is cut off."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from alignvlm.serving.web.errors import RequestError

HEAD_SECONDS = 20.0
"""How long the lines before a request's body may take to arrive. The body has limits of its own (guarded.py)."""
READ_SECONDS = 30.0
"""How often a client is looked at that does not take what is sent."""
SLOWEST_READER = 1024
"""Bytes per second that it must have taken by then."""

MAX_CONNECTIONS = 500
"""Most connections at a time; on most systems a process may have 1,024 files open."""
LAST_SECONDS = 9.0
"""How long an answer may still take once the server ends; it ends before the next layer."""


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1, which waits for a client as long as it likes."""

    _begun = 0.0
    _head: asyncio.TimerHandle | None = None
    _reader: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Called by asyncio: wait for a request's head. One connection too many ends the oldest without a request."""
        super().connection_made(transport)
        self._begun = self.loop.time()
        alive = [each for each in self.connections if isinstance(each, Connection) and not each.transport.is_closing()]
        if len(alive) > MAX_CONNECTIONS:
            idle = [each for each in alive if not each._is_answering]
            min(idle, key=lambda each: each._begun).transport.abort()
        transport.set_write_buffer_limits(high=0)  # `pause_writing` whenever the system takes no more
        self._head = self.loop.call_later(HEAD_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio; what comes between two requests is the beginning of a head."""
        super().data_received(data)
        if self._is_answering and self._head is not None:
            self._head.cancel()
            self._head = None
        elif not self._is_answering and self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for what is not HTTP: refused like other mistakes, unless a response is on its way."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json.dumps(RequestError(msg).body).encode()
        lines = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        for event in (h11.Response(status_code=400, headers=list(lines.items())), h11.Data(data=body)):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        """Called by asyncio when the client does not keep up."""
        super().pause_writing()
        self._look_again()

    def resume_writing(self) -> None:
        """Called by asyncio when the client has caught up."""
        super().resume_writing()
        if self._reader is not None:
            self._reader.cancel()
            self._reader = None

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio at the end of the connection."""
        for timer in (self._head, self._reader):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Called by uvicorn when it ends, which waits for answers but not for requests that are still arriving."""
        super().shutdown()
        if self._is_answering:
            self.loop.call_later(0 if self.cycle.more_body else LAST_SECONDS, self.transport.abort)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _look_again(self) -> None:
        self._reader = self.loop.call_later(READ_SECONDS, self._look, self.transport.get_write_buffer_size())

    def _look(self, unsent: int) -> None:
        """Check the client's speed. While writing is paused nothing is added, so what is missing has been taken."""
        if unsent - self.transport.get_write_buffer_size() < READ_SECONDS * SLOWEST_READER:
            self.transport.abort()
        else:
            self._look_again()
