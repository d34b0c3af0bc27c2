"""MLflow's client with a time limit per call: a server that sends a byte per second is given up like a silent one."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError

CALL_SECONDS = 60.0
"""Time for one call; MLflow's own limits (below) are per connection and per wait for the next byte."""
UPLOAD_BYTES_PER_SECOND = 100_000
"""A file gets the time on top that it takes at this speed."""
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",  # `Retry-After: 3600` would sleep for an hour
    "PGCONNECT_TIMEOUT": "10",
}
"""Environment variables of MLflow's HTTP client and of PostgreSQL's, unless they are set."""


class TimeLimit:
    """`with limit(): …` calls `overdue`, in another thread, when the block takes longer than `seconds`.

    A thread cannot be stopped: `overdue` has to end the process.
    """

    def __init__(self, overdue: Callable[[], None], seconds: float) -> None:
        self.seconds, self._overdue = seconds, overdue

    @contextmanager
    def __call__(self, extra: float = 0.0) -> Iterator[None]:
        timer = threading.Timer(self.seconds + extra, self._overdue)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


class Client:
    """The methods of `MlflowClient`, every call within the limit."""

    def __init__(self, uri: str, limit: TimeLimit) -> None:
        self._limit = limit
        mlflow = quiet_mlflow()
        with limit():
            self._client = mlflow.MlflowClient(uri)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._client, name)

        def limited(*arguments: Any, **keywords: Any) -> Any:
            with self._limit():
                return call(*arguments, **keywords)

        return limited

    def upload(self, run_id: str, file: Path, folder: str | None = None) -> None:
        """Send a file as an artifact."""
        with self._limit(extra=file.stat().st_size / UPLOAD_BYTES_PER_SECOND):
            self._client.log_artifact(run_id, str(file), folder)


def quiet_mlflow() -> Any:
    """The module. Its own news and its pages on errors are no news of the training: a failure is one line of ours."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import mlflow
    except ModuleNotFoundError as error:
        raise UserError("MLflow is not installed here: pip install 'alignvlm[train]'") from error

    for name in ("mlflow", "alembic", "urllib3", "sqlalchemy"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return mlflow
