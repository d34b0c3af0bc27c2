"""The workers' end in the training process: it starts one per tracker, wakes them, and waits at the end of the run.

While a server is away its worker tries again, and a next start (or `alignvlm track`) delivers the rest.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time

from alignvlm.run_folder import Run
from alignvlm.training.tracking import worker
from alignvlm.training.tracking.client import CALL_SECONDS
from alignvlm.training.tracking.failures import too_late
from alignvlm.training.tracking.target import NAMES, Target

RETRY_SECONDS = 30.0
CLOSE_SECONDS = 60.0
"""How long the end of a job waits for the last delivery."""


class Tracker:
    """The trackers of a run: `notify` asks all of them for a delivery and returns at once."""

    def __init__(self, run: Run) -> None:
        self._deliveries = [Delivery(target) for target in Target.all_of(run)]

    def notify(self) -> None:
        """There is something new in the run folder."""
        for delivery in self._deliveries:
            delivery.notify()

    def close(self) -> bool:
        """Make a last delivery; after `CLOSE_SECONDS` the rest is left for the next start or `alignvlm track`.

        Returns:
            Whether all trackers have everything.
        """
        for delivery in self._deliveries:
            delivery.end()
        deadline = time.monotonic() + CLOSE_SECONDS
        delivered = [delivery.wait(deadline) for delivery in self._deliveries]
        return all(delivered)

    def abandon(self) -> None:
        """End the workers where they are: the next start delivers what they have not."""
        for delivery in self._deliveries:
            delivery.kill()


class Delivery:
    """A worker process of rank 0, for one tracker."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._process: subprocess.Popen[bytes] | None = None
        self._started = -math.inf
        self._complained = False

    def notify(self) -> None:
        """Starts the worker, also one in place of one that ended, and wakes it."""
        if not self._is_running() and time.monotonic() > self._started + RETRY_SECONDS:
            self._start()
        self._tell(worker.NEW)

    def end(self) -> None:
        """Ask for the last delivery."""
        if not self._is_running():
            self._start()
        self._tell(worker.END)

    def wait(self, deadline: float) -> bool:
        """Wait for the last delivery until the deadline; returns whether the tracker has everything."""
        if self._process is None:
            return False
        name = NAMES[self._target.tracker]
        try:
            code = self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.kill()
            self._complain(too_late(self._target, CLOSE_SECONDS, worker.CONSEQUENCE))
        else:
            if code not in (0, worker.FAILED, worker.OVERDUE):
                self._complain(f"the process that talks to {name} died (exit code {code}); {worker.CONSEQUENCE}")
        return self._process.returncode == 0

    def kill(self) -> None:
        """End the worker, if there is one, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _start(self) -> None:
        """Start the worker; it finds modules where this process does. Secrets go through the pipe, not to `ps`."""
        self._started = time.monotonic()
        self._complained |= self._process is not None and self._process.returncode == worker.OVERDUE
        order = worker.Order(self._target, CALL_SECONDS, RETRY_SECONDS, self._complained, os.getpid())
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", worker.__name__],
                stdin=subprocess.PIPE,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
                bufsize=0,
            )
        except OSError as error:  # no memory, no process left
            self._complain(
                f"the process that talks to {NAMES[self._target.tracker]} cannot start; {worker.CONSEQUENCE}: {error}"
            )
            return
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._tell(order.to_json().encode())

    def _complain(self, line: str) -> None:
        if not self._complained:
            print(line, file=sys.stderr, flush=True)
        self._complained = True

    def _tell(self, line: bytes) -> None:
        """A worker that is gone or does not read is no reason to wait: the files keep what it misses."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line)
        except (BrokenPipeError, BlockingIOError):
            return
