"""Requests to object stores from any process: worker processes make them, others have a helper process for it.

The training process forks loader processes, and may not use a store before (engine.py). Its helper starts with the
first request, ends with it, and does nothing but requests.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError, LoadError
from data_pipeline.parallel import end_with_parent
from data_pipeline.stores import engine
from data_pipeline.stores.requests import Get, Request
from data_pipeline.stores.waiting import late

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_START = "import sys; sys.path.insert(0, {!r}); from data_pipeline.stores.helper import main; main({}, {})"
_helper: _Helper | None = None
_lock = threading.RLock()  # an answer that is an error may make the next request in the same thread


def submit(request: Request) -> Future[Any]:
    """Make a request, in this process or by its helper; the future gives what `request.run` returns or raises."""
    if engine.is_leaf():
        return _run(request)
    global _helper
    with _lock:
        if _helper is None or _helper.is_gone:
            _helper = _Helper()
        return _helper.submit(request)


def _run(request: Request) -> Future[Any]:
    """Make a request in this process."""
    return late.submit(request) if isinstance(request, Get) and request.hedged else engine.submit(request.run())


def ask(request: Request) -> Any:
    """`submit`, and wait for it."""
    return submit(request).result()


def ask_many(requests: Iterable[Request], at_once: int) -> Iterator[Any]:
    """The answers of many requests in their order; so many are on their way at a time."""
    waiting: deque[Future[Any]] = deque()
    for request in requests:
        waiting.append(submit(request))
        if len(waiting) == at_once:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def stop() -> None:
    """End this process' helper; the next request starts one, with the environment of that moment."""
    global _helper
    with _lock:
        if _helper is not None:
            _helper.stop()
        _helper = None


class _Helper:
    """The helper of this process, and the requests that it has not answered yet."""

    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        ours, theirs = socket.socketpair()
        with theirs:
            start = [sys.executable, "-c", _START.format(root, os.getpid(), theirs.fileno())]
            self.process = subprocess.Popen(start, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self.is_gone = False
        self._connection = Connection(ours.detach())
        self._waiting: dict[int, Future[Any]] = {}
        self._next = 0
        self._write = threading.Lock()
        threading.Thread(target=self._listen, name="store-helper", daemon=True).start()

    def submit(self, request: Request) -> Future[Any]:
        future: Future[Any] = Future()
        with self._write:
            number, self._next = self._next, self._next + 1
            self._waiting[number] = future
            try:
                self._connection.send((number, request))
            except OSError:
                self._end()
        return future

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _listen(self) -> None:
        try:
            while True:
                number, result, error = self._connection.recv()
                future = self._waiting.pop(number)
                if not future.set_running_or_notify_cancel():
                    continue
                if error is None:
                    future.set_result(result)
                else:
                    future.set_exception(error)
        except (EOFError, OSError):
            self._end()

    def _end(self) -> None:
        """The helper was killed: whoever waits for it is told, and the next request starts another one."""
        self.is_gone = True
        while self._waiting:
            future = self._waiting.popitem()[1]
            if future.set_running_or_notify_cancel():
                future.set_exception(LoadError("the helper process that reads object stores was killed"))


def main(parent: int, descriptor: int) -> None:
    """The helper: answers requests from its parent until that ends."""
    engine.set_helping()
    for asked in _SIGNALS:  # a scheduler signals every process of a job; this one ends with the training process
        signal.signal(asked, signal.SIG_IGN)
    end_with_parent(parent)
    connection, lock = Connection(descriptor), threading.Lock()

    def answer(number: int, future: Future[Any]) -> None:
        error = future.exception()
        if error is not None and not isinstance(error, DataError):
            error = LoadError(f"{type(error).__name__}: {error}")
        result = None if error else future.result()
        if isinstance(result, tuple) and isinstance(result[0], memoryview):
            result = bytes(result[0]), *result[1:]
        with lock:
            connection.send((number, result, error))

    try:
        while True:
            number, request = connection.recv()
            _run(request).add_done_callback(partial(answer, number))
    except (EOFError, OSError):  # the latter where an answer lay there unread
        os._exit(0)


def _after_fork() -> None:
    global _helper, _lock
    _helper, _lock = None, threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
