"""Signals of schedulers and users: all ranks agree at the next step, save a checkpoint and end in order.

Outside the steps (evaluation, export, preparing) nothing is unsaved: the process ends at once with the exit code that
asks for another start. While rank 0 makes its last delivery the job ends anyway: launchers send SIGTERM to it, because
the other ranks have ended before.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

REQUEUE = 75
"""Exit code that asks the launcher to start the job again (EX_TEMPFAIL): everything is saved."""

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class Signals:
    """Handles the signals while it is open; `received` is the name of the first one, or None."""

    def __init__(
        self, before_exit: Callable[[], None] = lambda: None, before_save: Callable[[], None] = lambda: None
    ) -> None:
        """`before_exit` is called when a signal ends the process at once, `before_save` when it lets the job save."""
        self.received: str | None = None
        self.stepping = False
        """Set while there are steps that a save would keep."""
        self.ending = False
        """Set when the process ends by itself in a minute: only a second Ctrl-C ends it at once."""
        self._before_exit, self._before_save = before_exit, before_save
        self._interrupts = 0
        self._process = 0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        self._process = os.getpid()
        for number in HANDLED:
            if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN):  # started by nohup
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc: object) -> None:
        while self._previous:
            signal.signal(*self._previous.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked helper, which got the signal that was meant for all
            os._exit(REQUEUE)
        name = signal.Signals(number).name
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 or not (self.stepping or self.ending):
            try:
                print(f"{name}: ending at once; the same command resumes from the last checkpoint", file=sys.stderr)
                sys.stdout.flush()
                sys.stderr.flush()
                self._before_exit()
            finally:  # also when the terminal is gone
                os._exit(REQUEUE)
        if self.ending and number == signal.SIGINT:
            with suppress(OSError, RuntimeError):  # the terminal is gone, or was being written to
                print(f"{name}: ending after the last delivery, within a minute", file=sys.stderr, flush=True)
        if self.stepping:
            self.received = self.received or name
            self._before_save()
