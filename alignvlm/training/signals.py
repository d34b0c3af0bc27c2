"""Signals of schedulers and users: remembered, agreed on by all ranks at the next step, then a save and an orderly end.

Between steps (evaluation, export, preparing) there is nothing to save that is not on disk already: the process ends
at once with the code that asks for another start.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

REQUEUE = 75
"""Exit code that asks the launcher to start the job again (EX_TEMPFAIL): everything is saved."""

HANDLED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Signals:
    """Installs the handlers; `received` is the name of the first signal, or None."""

    def __init__(self) -> None:
        self.received: str | None = None
        self.stepping = False
        for number in HANDLED:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.stepping or (number == signal.SIGINT and self.received == name):
            print(f"{name}: ending at once; the same command goes on from the last checkpoint", file=sys.stderr)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(REQUEUE)
        self.received = self.received or name
