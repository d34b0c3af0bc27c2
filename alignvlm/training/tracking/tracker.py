"""Deliveries to MLflow in a thread: training never waits for a tracking server.

While the server is away the thread tries again later, and a next start (or `alignvlm track`) delivers the rest.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from alignvlm.run_folder import Run
from alignvlm.training.tracking.mirror import Mirror, quiet_mlflow

RETRY_SECONDS = 30.0
CLOSE_SECONDS = 60.0
"""How long the end of a job waits for the last delivery."""


class Tracker:
    """The mirror in a thread of rank 0: `notify` asks for a delivery and returns at once.

    The thread runs between `start` and `pause`: while loader processes are forked there must be no other thread, which
    might hold a lock that the child would wait for. It delivers what it missed when it starts again.
    """

    def __init__(self, run: Run) -> None:
        self._mirror = Mirror(run)
        self._wake, self._ending = threading.Event(), threading.Event()
        self._complained = False
        self._monitor: Any = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Deliver what is new, now and whenever `notify` says so."""
        self._ending.clear()
        self._wake.set()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def notify(self) -> None:
        """There is something new in the run folder."""
        self._wake.set()

    def pause(self) -> None:
        """End the thread; waits for a delivery under way, at most `CLOSE_SECONDS`."""
        self._ending.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        if self._monitor is not None:
            self._monitor.finish()
            self._monitor = None

    def close(self) -> None:
        """Make a last delivery; after `CLOSE_SECONDS` the rest is left for the next start or `alignvlm track`."""
        self.pause()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._try_deliver, name="mlflow", daemon=True)
            self._thread.start()
            self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        while not self._ending.is_set():
            self._wake.wait()
            self._wake.clear()
            if self._ending.is_set():
                return
            if self._try_deliver():
                self._monitor_system()
            else:
                self._ending.wait(RETRY_SECONDS)
                self._wake.set()

    def _try_deliver(self) -> bool:
        """Whether the delivery succeeded; the first of several failures is reported."""
        import mlflow

        try:
            self._mirror.sync()
        except (mlflow.MlflowException, OSError) as error:
            if not self._complained:
                print(f"MLflow at {self._mirror.uri} does not answer; metrics wait on disk: {error}", file=sys.stderr)
            self._complained = True
            return False
        self._complained = False
        return True

    def _monitor_system(self) -> None:
        """Let MLflow record the use of CPU, memory and GPU in the parent run."""
        if self._monitor is None:
            mlflow = quiet_mlflow()
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            mlflow.set_tracking_uri(self._mirror.uri)
            self._monitor = SystemMetricsMonitor(self._mirror.state["parent"], resume_logging=True)
            self._monitor.start()
