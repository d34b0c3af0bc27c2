"""Ranks as threads of one process: what evaluation needs of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from alignvlm.system.ranks import Ranks


class ThreadRanks:
    """`size` ranks that hear each other at a gate which all of them must reach."""

    def __init__(self, size: int) -> None:
        self.size, self.gate = size, threading.Barrier(size, timeout=300)
        self.said: list[Any] = [None] * size

    def run(self, work: Callable[[Ranks], Any]) -> list[Any]:
        """What `work` gives each of them, or the error that it ends with."""
        results: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            try:
                results[rank] = work(_Thread(rank, self))
            except Exception as error:  # whatever it is, the test must see it
                results[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class _Thread(Ranks):
    def __init__(self, rank: int, others: ThreadRanks) -> None:
        self.rank, self.size, self._others = rank, others.size, others

    def broadcast(self, value: Any) -> Any:
        return self.all_gather(value)[0]

    def all_gather(self, value: Any) -> list[Any]:
        self._others.said[self.rank] = value
        self._others.gate.wait()
        said = list(self._others.said)
        self._others.gate.wait()
        return said
