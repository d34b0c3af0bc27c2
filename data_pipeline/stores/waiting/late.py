"""Reads of samples: threads that wait for the client, and a second request for what is late.

A thread that waits for a range takes half the CPU time of the client's asyncio futures, each of which takes Python's
lock in two threads. Whatever is not the range is asked for again in the asyncio thread, with all errors; a store that
did not answer is waited for there at once, with patience.
"""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.stores import engine, remote
from data_pipeline.stores.failures import TransientError
from data_pipeline.stores.remote import ObjectInfo
from data_pipeline.stores.requests import Get
from data_pipeline.stores.waiting.outages import answered
from data_pipeline.stores.waiting.patience import is_open

LOOK_SECONDS = 0.05
"""How often reads are looked at for being late."""
_HEDGE_SHARE = 0.05
_HEDGE_FROM = 20
_HEDGE_SECONDS = 0.1
Result = tuple[Any, ObjectInfo]


@dataclass(eq=False)
class _Read:
    get: Get
    future: Future[Result]
    began: float
    tries: int = 0
    """Requests for it that have not ended."""
    is_hedged: bool = False
    is_over: bool = False


def submit(get: Get) -> Future[Result]:
    """Read a range; the future gives what `get.run` returns or raises, the bytes perhaps as a memoryview.

    Raises:
        LoadError: a process from which this one was forked used a store.
    """
    global _reads
    engine.begin()
    if not is_open(get.url, get.name):
        return engine.submit(get.run())
    with _start:
        if _reads is None:
            _reads = LateReads()
    return _reads.submit(get)


class Latencies:
    """How long reads took lately, and how many second requests there may be.

    A store answers one request in a thousand after seconds; a second request is answered at once. It is made when
    three medians, the 95th percentile and 100 ms have passed, for at most one in twenty, and the first answer counts.
    """

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=200)
        self.num_reads = self.num_hedges = self._num_took = 0
        self._delay = 0.0

    def delay(self) -> float:
        """Seconds after which a second request is made; 0 while too few reads were seen."""
        return self._delay if len(self.seconds) >= _HEDGE_FROM else 0.0

    def may_hedge(self) -> bool:
        """Whether there may be another second request, which is then counted."""
        if self.num_hedges >= _HEDGE_SHARE * self.num_reads:
            return False
        self.num_hedges += 1
        return True

    def took(self, seconds: float) -> None:
        """Note how long a read took."""
        self.seconds.append(seconds)
        self._num_took += 1
        if self._num_took >= _HEDGE_FROM and self._num_took % 10 == 0:
            ordered = sorted(self.seconds)
            p95 = ordered[int(0.95 * (len(ordered) - 1))]
            self._delay = max(3 * statistics.median(ordered), p95, _HEDGE_SECONDS)


class LateReads:
    """The reads of a process, by any of its threads."""

    def __init__(self) -> None:
        self.latencies = Latencies()
        self._queue: SimpleQueue[_Read] = SimpleQueue()
        self._free = 0
        """Threads that have nothing to do."""
        self._flying: dict[_Read, None] = {}
        self._lock = threading.Lock()
        threading.Thread(target=self._look, name="late", daemon=True).start()

    def submit(self, get: Get) -> Future[Result]:
        """As `submit` of this module."""
        read = _Read(get, Future(), time.monotonic())
        with self._lock:
            self.latencies.num_reads += 1
            self._flying[read] = None
            self._try(read)
        return read.future

    def _try(self, read: _Read) -> None:
        """Give the read to a thread; the caller holds the lock. Each of several reads at once has its own thread."""
        read.tries += 1
        if self._free:
            self._free -= 1
        else:
            threading.Thread(target=self._work, name="read-far", daemon=True).start()
        self._queue.put(read)

    def _work(self) -> None:
        while True:
            read = self._queue.get()
            result = None if read.is_over or read.future.cancelled() else _read(read.get)
            with self._lock:
                self._free += 1
                read.tries -= 1
                is_end = not read.is_over and (isinstance(result, tuple) or not read.tries)
                if is_end:
                    read.is_over = True
                    del self._flying[read]
                    if isinstance(result, tuple):
                        self.latencies.took(time.monotonic() - read.began)
            if is_end:  # without the lock: whoever waits for it may ask for more
                _finish(read, result)
            del read, result  # not kept until the next one comes

    def _look(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            with self._lock:
                before = time.monotonic() - self.latencies.delay()
                for read in list(self._flying) if self.latencies.delay() else ():
                    if read.began > before:
                        break
                    if read.is_hedged or read.future.cancelled() or not is_open(read.get.url, read.get.name):
                        continue
                    if self.latencies.may_hedge():
                        read.is_hedged = True
                        self._try(read)


def _read(get: Get) -> Result | TransientError | None:
    """The bytes and what the object is now, or how the store failed; None when it is not what was asked for."""
    assert get.end is not None
    try:
        data, info = remote.get_range(get.url, get.name, get.begin, get.end, etag=get.etag)
    except TransientError as error:
        return error
    except BaseException:  # of Rust too: it is asked for again, and then raised in whoever waits
        return None
    answered(get.url, get.name)
    return (data, info) if len(data) == get.end - get.begin and get.size in (None, info.size) else None


def _finish(read: _Read, result: Result | TransientError | None) -> None:
    """Give a result, or what the asyncio thread makes of the request."""
    future = read.future
    if isinstance(result, tuple):
        if future.set_running_or_notify_cancel():
            future.set_result(result)
        return
    if future.cancelled():
        return
    try:
        again = engine.submit(read.get.run(None if result is None else (result, read.began)))
    except DataError as error:
        if future.set_running_or_notify_cancel():
            future.set_exception(error)
        return

    def ended(_: Future[Result]) -> None:
        if again.cancelled() or not future.set_running_or_notify_cancel():
            return
        if error := again.exception():
            future.set_exception(error)
        else:
            future.set_result(again.result())

    again.add_done_callback(ended)
    future.add_done_callback(lambda each: again.cancel() if each.cancelled() else None)


_reads: LateReads | None = None
_start = threading.Lock()


def _after_fork() -> None:
    global _reads, _start
    _reads, _start = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
