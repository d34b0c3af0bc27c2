"""Ranks as threads of one process: what evaluation needs of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class ThreadRanks:
    """`size` ranks that meet in a barrier and hear what rank 0 says."""

    def __init__(self, size: int) -> None:
        self.size, self._gate, self._said = size, threading.Barrier(size, timeout=300), None

    def of(self, rank: int) -> dict[str, Any]:
        """Arguments of `evaluate` and `run_benchmarks` for one of them."""

        def broadcast(value: Any) -> Any:
            if rank == 0:
                self._said = value
            self._gate.wait()
            said = self._said
            self._gate.wait()
            return said

        return {"rank": rank, "world_size": self.size, "barrier": self._gate.wait, "broadcast": broadcast}

    def run(self, work: Callable[[int], None]) -> None:
        """`work(rank)` on all of them, to its end."""
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
