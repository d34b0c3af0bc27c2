"""Signals of schedulers and users: all ranks agree at the next step, save a checkpoint and end in order.

Outside the steps (evaluation, export, preparing) nothing is unsaved: the process ends at once with the exit code that
asks for another start.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

REQUEUE = 75
"""Exit code that asks the launcher to start the job again (EX_TEMPFAIL): everything is saved."""

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """Handles the signals while it is open; `received` is the name of the first one, or None."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.stepping = False
        """Set while there are steps that a save would keep."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._previous = {number: signal.signal(number, self._handle) for number in HANDLED}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.stepping or (number == signal.SIGINT and self.received == name):
            print(f"{name}: ending at once; the same command resumes from the last checkpoint", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(REQUEUE)
        self.received = self.received or name
