"""The asyncio thread of a process that talks to object stores, and the guard against using stores across a fork.

The Rust runtime below does not survive a fork: a child of a process that used it would wait for ever. So the thread
starts with the first request, and a child of a process that had it gets an error instead. Samples are read by further
threads (waiting/late.py), which start behind it.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from data_pipeline.errors import LoadError

T = TypeVar("T")
_loop: asyncio.AbstractEventLoop | None = None
_start = threading.Lock()
_lost = _helping = False


def submit(work: Coroutine[Any, Any, T]) -> Future[T]:
    """Run a coroutine in this process' thread for stores.

    Raises:
        LoadError: a process from which this one was forked had such a thread.
    """
    try:
        loop = begin()
    except LoadError:
        work.close()
        raise
    return asyncio.run_coroutine_threadsafe(work, loop)


def is_leaf() -> bool:
    """Whether this process makes requests itself: a worker process, which forks no others, or a helper."""
    return _helping or multiprocessing.parent_process() is not None


def set_helping() -> None:
    """This process is a helper (helper.py)."""
    global _helping
    _helping = True


def begin() -> asyncio.AbstractEventLoop:
    """Have the thread run before this process uses a store in any other. Raises LoadError as `submit`."""
    global _loop
    if _lost:
        raise LoadError(
            "an object store was used before this process was forked, and cannot be used in it; "
            "start the process by 'spawn', or read the store in it first"
        )
    with _start:
        if _loop is None:
            # One thread for the runtime, not one per core: dozens of loader processes share the cores.
            os.environ.setdefault("TOKIO_WORKER_THREADS", "1")
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="stores", daemon=True).start()
    return _loop


def _after_fork() -> None:
    global _loop, _lost, _start, _helping
    _lost = _lost or _loop is not None
    _loop, _start, _helping = None, threading.Lock(), False


os.register_at_fork(after_in_child=_after_fork)
