"""Processes for indexing, measuring and generating: how many, how they start, and that they end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager

PARENT_SECONDS = 0.5
"""How often a process looks whether its parent is still there."""


@contextmanager
def pool(num_processes: int | None, num_tasks: int) -> Iterator[ProcessPoolExecutor | None]:
    """An executor of at most `num_processes` (null: one per usable core); None when one process is enough."""
    count = min(num_processes or usable_cores(), num_tasks)
    if count <= 1:
        yield None
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(count, mp_context=context, initializer=_start_worker, initargs=(os.getpid(),)) as executor:
        yield executor


def _start_worker(parent: int) -> None:
    single_threaded()
    end_with_parent(parent)


def end_with_parent(parent: int, grace: float = 0.0) -> None:
    """End this process soon after its parent has ended, in whatever way: a thread looks twice a second.

    Args:
        grace: seconds between SIGTERM, on which the process may save, and SIGKILL; 0: SIGKILL only.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        if grace:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(grace)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def single_threaded() -> None:
    """Make this worker process use one thread: its siblings use the other cores. Threads also do not survive a fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
