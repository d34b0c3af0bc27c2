"""A pool of processes for indexing, measuring and generating: the one place that decides how many, and how."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def pool(num_processes: int | None, num_tasks: int) -> Iterator[ProcessPoolExecutor | None]:
    """An executor of at most `num_processes` (null: one per usable core); None when one process is enough."""
    count = min(num_processes or usable_cores(), num_tasks)
    if count <= 1:
        yield None
        return
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(count, mp_context=context, initializer=single_threaded) as executor:
        yield executor


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def single_threaded() -> None:
    """Make this worker process use one thread: its siblings use the other cores. Threads also do not survive a fork."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
