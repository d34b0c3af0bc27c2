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
    """The mirror in a thread of rank 0: `notify` asks for a delivery and returns at once."""

    def __init__(self, run: Run) -> None:
        self._mirror = Mirror(run)
        self._wake, self._closing = threading.Event(), threading.Event()
        self._complained = False
        self._monitor: Any = None
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._wake.set()

    def notify(self) -> None:
        """There is something new in the run folder."""
        self._wake.set()

    def close(self) -> None:
        """A last delivery; after `CLOSE_SECONDS` the rest is left for the next start or `alignvlm track`."""
        self._closing.set()
        self._wake.set()
        self._thread.join(CLOSE_SECONDS)
        if self._monitor is not None:
            self._monitor.finish()

    def _work(self) -> None:
        import mlflow

        errors = (mlflow.MlflowException, OSError)
        while True:
            self._wake.wait()
            closing = self._closing.is_set()
            self._wake.clear()
            try:
                self._deliver()
            except errors as error:
                if not self._complained:
                    print(
                        f"MLflow at {self._mirror.uri} does not answer; metrics wait on disk: {error}", file=sys.stderr
                    )
                self._complained = True
                if not closing:
                    self._closing.wait(RETRY_SECONDS)
                    self._wake.set()
            if closing:
                return

    def _deliver(self) -> None:
        self._mirror.sync()
        if self._monitor is None:
            mlflow = quiet_mlflow()
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            mlflow.set_tracking_uri(self._mirror.uri)
            self._monitor = SystemMetricsMonitor(self._mirror.state["parent"], resume_logging=True)
            self._monitor.start()
        self._complained = False
