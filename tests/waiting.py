"""Waiting in tests for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path


def until(
    condition: Callable[[], object], what: str = "", seconds: float = 30, describe: Callable[[], str] = str
) -> None:
    """Wait until the condition holds; when it does not in time, the error says `what` and ends with `describe()`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{describe()}"
        time.sleep(0.05)


def runs(process: int) -> bool:
    """Whether a process is there and no zombie, which nobody may collect in a container."""
    try:
        return Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False
