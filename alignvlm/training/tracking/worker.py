"""The process that delivers to one tracker while a run trains: whatever that does or does not do, training never waits.

Its standard input is a line of JSON (`Order`), and then a line for everything new and for the end of the run. It says
one line on standard error when a delivery fails; whatever libraries print is dropped.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from typing import IO, Any

from alignvlm.system.leaving import leave
from alignvlm.training.tracking.client import TimeLimit, quiet_mlflow
from alignvlm.training.tracking.failures import explain, first_line, too_late
from alignvlm.training.tracking.mirrors import MIRRORS, Mirror
from alignvlm.training.tracking.mirrors.mlflow import MLflow
from alignvlm.training.tracking.target import NAMES, Target
from data_pipeline.parallel import end_with_parent

FAILED = 1
"""Exit code: the last delivery failed, and a line said so."""
OVERDUE = 3
"""Exit code: the tracker did not answer in time, and a line said so; another process may try again."""
NEW, END = b"new\n", b"end\n"
CONSEQUENCE = "metrics wait on disk"


@dataclass(frozen=True)
class Order:
    """What a worker is told first."""

    target: Target
    call_seconds: float
    """Time limit of one call to the tracker."""
    retry_seconds: float
    """Pause after a failure."""
    complained: bool
    """A failure was reported and no delivery succeeded since then."""
    parent: int
    """Process id of the training; the worker ends when it does."""

    @classmethod
    def from_json(cls, line: str | bytes) -> Order:
        """What `to_json` returned."""
        fields = json.loads(line)
        return cls(**fields | {"target": Target(**fields["target"])})

    def to_json(self) -> str:
        """One line, secrets of the tracking URI included: for a pipe, never for a file."""
        return json.dumps(asdict(self)) + "\n"


class Worker:
    """Delivers when it is told to, tries again after a failure, and reports the first failure of several."""

    def __init__(self, order: Order, output: IO[str]) -> None:
        self._order, self._output = order, output
        self._complained = order.complained
        self._limit = TimeLimit(self._give_up, order.call_seconds)
        self._mirror: Mirror | None = None
        self._monitor: Any = None
        self._wake, self._ending = threading.Event(), threading.Event()

    def listen(self, orders: IO[bytes]) -> None:
        """Wake `work` for every line until the end; ends this process when the one that trains is gone."""
        for line in orders:
            if line == END:
                self._ending.set()
            self._wake.set()
            if line == END:
                return
        os._exit(0)

    def work(self) -> int:
        """Deliver until the end, and then once more; the exit code says whether that succeeded."""
        while not self._ending.is_set():
            self._wake.wait()
            self._wake.clear()
            if self.deliver():
                self._monitor_system()
            else:
                self._ending.wait(self._order.retry_seconds)
                self._wake.set()
        if self._monitor is not None:
            with self._limit():
                self._monitor.finish()
        return 0 if self.deliver(last=True) else FAILED

    def deliver(self, last: bool = False) -> bool:
        """Whether the tracker has everything now."""
        target = self._order.target
        try:
            self._mirror = self._mirror or MIRRORS[target.tracker](target, self._limit)
            self._mirror.sync()
            if last:
                with self._limit():
                    self._mirror.close()
        except Exception as error:  # trackers hand on whatever their drivers, plugins and servers' texts raise
            self._mirror = None  # the next attempt begins anew, from the files
            self._complain(explain(target, error, CONSEQUENCE))
            return False
        for line in self._mirror.notes:
            self._say(line)
        self._mirror.notes.clear()
        self._complained = False
        return True

    def _monitor_system(self) -> None:
        """Let MLflow record the use of CPU, memory and GPU in the parent run."""
        if self._monitor is None and isinstance(self._mirror, MLflow):
            mlflow = quiet_mlflow()
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            mlflow.set_tracking_uri(self._order.target.uri)
            with self._limit():
                self._monitor = SystemMetricsMonitor(self._mirror.state["parent"], resume_logging=True)
            self._monitor.start()

    def _give_up(self) -> None:
        self._complain(too_late(self._order.target, self._order.call_seconds, CONSEQUENCE))
        os._exit(OVERDUE)

    def _complain(self, line: str) -> None:
        if not self._complained:
            self._say(line)
        self._complained = True

    def _say(self, line: str) -> None:
        print(line, file=self._output, flush=True)


def show_warnings(target: Target, output: IO[str]) -> None:
    """Say that mlflow.json or wandb.json is damaged; what is wrong with other files the training says itself."""
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    states = [str(path) for path in (target.folder.mlflow_state, target.folder.wandb_state)]
    handler.addFilter(lambda record: any(state in record.getMessage() for state in states))
    logging.getLogger("data_pipeline").addHandler(handler)


def main() -> int:
    """Read the order and work."""
    gc.set_threshold(100_000)  # importing MLflow takes 2.1 instead of 2.8 s of CPU time, beside a job that starts
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # the run decides when it ends
        signal.signal(number, signal.SIG_IGN)
    output = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="backslashreplace")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    order = Order.from_json(sys.stdin.buffer.readline())
    worker = Worker(order, output)
    show_warnings(order.target, output)
    end_with_parent(order.parent)
    threading.Thread(target=worker.listen, args=(sys.stdin.buffer,), daemon=True).start()
    try:
        return worker.work()
    except Exception as error:  # standard error is closed to tracebacks
        name = NAMES[order.target.tracker]
        print(f"{name} cannot be used; {CONSEQUENCE}: {type(error).__name__}: {first_line(error)}", file=output)
        return FAILED


if __name__ == "__main__":
    leave(main())
