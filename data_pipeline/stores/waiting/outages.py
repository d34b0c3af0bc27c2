"""Which stores and objects do not answer this process, and who of those that wait for one asks for it.

An object that fails keeps nobody from the others of its store, which is away when two of its objects fail and nothing
of it is answered meanwhile. Those that wait for the same thing ask in turn, one every few seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from data_pipeline.stores.folders import place_of, store_of

RETRY_SECONDS = 2.0
"""Pause between the end of a try and the next one."""
_NEVER = float("-inf")
_outages: dict[str, Outage] = {}
"""Store or place of an object that does not answer -> who waits for it."""
_failing: dict[str, set[str]] = {}
"""Store -> places of its objects that failed since it answered last."""
_answered: dict[str, float] = {}
"""Store, or place of an object that has failed once -> when it answered last, by this process' monotonic clock."""
_refused: dict[str, float] = {}
"""Place of an object -> when a request for it was refused for the number of requests, first since it was answered."""


class Outage:
    """A store or an object that does not answer. Only `end` may be called outside the event loop's thread."""

    def __init__(self) -> None:
        self.is_over = self._is_asked = False
        self._waiting: list[str] = []
        self._asked: set[str] = set()
        """Objects that were asked for. A request for another object goes first: that one may be answered."""
        self._loop, self._changed = asyncio.get_running_loop(), asyncio.Event()
        self._next = time.monotonic() + RETRY_SECONDS

    @asynccontextmanager
    async def turn(self, place: str) -> AsyncIterator[None]:
        """Wait until it is over, or until it is time to ask again and nobody else does: then the block asks."""
        self._waiting.append(place)
        try:
            while not self.is_over and (self._is_asked or self._comes_later(place)):
                await self._changed.wait()
        finally:
            self._waiting.remove(place)
            self._wake()
        if self.is_over:
            yield
            return
        self._is_asked = True
        self._asked.add(place)
        try:
            while not self.is_over and (pause := self._next - time.monotonic()) > 0:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._changed.wait()
            yield
        finally:
            self._is_asked, self._next = False, time.monotonic() + RETRY_SECONDS
            self._wake()

    def _comes_later(self, place: str) -> bool:
        return place in self._asked and not self._asked.issuperset(self._waiting)

    def end(self) -> None:
        """Let all who wait go on."""
        self.is_over = True
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._changed.set()  # in the order in which they came; one that has asked comes last
        self._changed = asyncio.Event()


def current(url: str, name: str) -> Outage | None:
    """The outage for whose end a request has to wait: of the store, or of the object."""
    return _outages.get(store_of(url)) or _outages.get(place_of(url, name)) if _outages else None


def answered(url: str, name: str) -> None:
    """Note that a request was answered, in whatever way. Any thread may."""
    store, now = store_of(url), time.monotonic()
    _answered[store] = now
    if not _failing and not _outages and len(_answered) == 1:
        return  # nothing ever failed
    place = place_of(url, name)
    if place in _answered:
        _answered[place] = now
    _failing.pop(store, None)
    for key in (store, place):
        if outage := _outages.pop(key, None):
            outage.end()


def failed(url: str, name: str, since: float) -> bool:
    """Note that a try since then had no answer. False: others of the same object had, so none has to wait for it."""
    store, place = store_of(url), place_of(url, name)
    if _answered.setdefault(place, _NEVER) >= since:
        return False
    key = place
    if _answered.get(store, _NEVER) < since:
        failing = _failing.setdefault(store, set())
        failing.add(place)
        key = store if len(failing) > 1 else place
    if key not in _outages:
        _outages[key] = Outage()
    return True


def refused(url: str, name: str) -> bool:
    """Note that a request was refused for the number of requests. True: of this object alone, as it seems.

    It was refused before and not answered since, while others of its store were.
    """
    place, now = place_of(url, name), time.monotonic()
    if _answered.setdefault(place, _NEVER) >= _refused.get(place, _NEVER):
        _refused[place] = now
    return _refused[place] <= _answered.get(store_of(url), _NEVER)
