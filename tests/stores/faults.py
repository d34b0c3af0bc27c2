"""What goes wrong between a reader and a store: latency, slow answers, 503 and 429, resets, cut and stalled bodies."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Faults:
    """Shares of requests (0 to 1) and seconds; `counts` says what happened."""

    latency: float = 0.0
    """Seconds until the first byte."""
    bandwidth: float = 0.0
    """Bytes per second of one connection; 0: unlimited."""
    tail: float = 0.0
    """Share of requests whose first byte takes `tail_seconds`."""
    tail_seconds: float = 1.5
    busy: float = 0.0
    """Share answered by 503 or 429."""
    reset: float = 0.0
    """Share whose connection is reset instead of an answer."""
    cut: float = 0.0
    """Share whose connection is closed in the middle of the body."""
    stall: float = 0.0
    """Share whose body stops in the middle, the connection open."""
    down: bool = False
    """Every connection is reset."""
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._now = 0

    async def answer(self, writer: asyncio.StreamWriter, head: bytes, body: bytes, asked: float | None = None) -> bool:
        """Send an answer, or what the faults make of it; False: the connection is over.

        Args:
            asked: the loop's time at which the request came; None: now. What a store behind took since is part of the
                latency and of the time of the body, not added to them.
        """
        loop = asyncio.get_running_loop()
        asked = loop.time() if asked is None else asked
        self.counts["requests"] += 1
        self.counts["bytes"] += len(body)
        chance = self._random.random()
        began = asked + (self.tail_seconds if self._random.random() < self.tail else self.latency)
        self._now += 1
        self.counts["at once"] = max(self.counts["at once"], self._now)
        await asyncio.sleep(max(0.0, began - loop.time()))
        self._now -= 1
        if self.down or (chance := chance - self.reset) < 0:
            self.counts["reset"] += 1
            writer.transport.abort()
            return False
        if (chance := chance - self.busy) < 0:
            self.counts["busy"] += 1
            status = self._random.choice([b"503 Slow Down", b"429 Too Many Requests"])
            writer.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nretry-after: 1\r\n\r\n")
            return True
        writer.write(head)
        if body and (chance := chance - self.cut) < 0:
            self.counts["cut"] += 1
            writer.write(body[: len(body) // 2])
            await writer.drain()
            writer.transport.abort()
            return False
        if body and chance - self.stall < 0:
            self.counts["stall"] += 1
            writer.write(body[: len(body) // 2])
            await asyncio.sleep(3600)
        await self._send(writer, body, began)
        return True

    async def _send(self, writer: asyncio.StreamWriter, body: bytes, began: float) -> None:
        piece = 1 << 16
        for begin in range(0, len(body), piece):
            writer.write(body[begin : begin + piece])
            await writer.drain()
            if self.bandwidth:
                ready = began + min(begin + piece, len(body)) / self.bandwidth
                await asyncio.sleep(max(0.0, ready - asyncio.get_running_loop().time()))
