"""A run folder with metrics, without a training; servers that misbehave."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from alignvlm.config import load_recipe
from alignvlm.run_folder import Run
from alignvlm.training.tracking.client import TimeLimit
from alignvlm.training.tracking.mirrors.mlflow import MLflow
from alignvlm.training.tracking.target import Target
from tests.jobs import TINY, copy_store
from tests.web import web_server

SECRET = "s3cr%40t-word"
LOGIN = f"someone:{SECRET}@"


@pytest.fixture(autouse=True)
def quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variables of MLflow's, and short limits for one request."""
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")


@pytest.fixture
def run_folder(tmp_path: Path) -> Run:
    run = Run(replace(load_recipe(str(TINY)), runs=str(tmp_path / "runs")))
    run.open()
    copy_store(tmp_path / "runs")
    return run


def log_steps(run: Run, first: int, last: int, stage: str = "connector", **more: object) -> None:
    with run.folder.metrics.open("a") as file:
        for step in range(first, last + 1):
            record = {
                "stage": stage,
                "step": step,
                "epoch": 0,
                "time": 1e9 + step,
                "loss": 1 / step,
                "lr": {"vision": 0.1},
            }
            file.write(json.dumps(record | more) + "\n")


def mirror_of(run: Run) -> MLflow:
    return MLflow(Target.of(run), TimeLimit(lambda: None, 60))


def delivered(mirror: MLflow, stage: str = "connector", key: str = "loss") -> list[tuple[int, float]]:
    history = mirror.client.get_metric_history(mirror.state["stages"][stage], key)
    return sorted((m.step, m.value) for m in history)


class Handler(BaseHTTPRequestHandler):
    """Answers every request by the server's behaviour."""

    behaviour: Callable[[Handler], None]

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.behaviour()

    do_POST = do_GET


def answer(status: int, body: str = "<html>\n<h1>Sorry</h1>\n</html>", **headers: str) -> Callable[[Handler], None]:
    def behaviour(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body.encode())

    return behaviour


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()


def trickle(handler: Handler) -> None:
    """A byte at a time, for ever: no wait for the next one is long."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.2)


@contextmanager
def serving(behaviour: Callable[[Handler], None]) -> Iterator[str]:
    """`host:port` of a server that answers everything like this."""
    with web_server(type("Behaving", (Handler,), {"behaviour": behaviour})) as port:
        yield f"127.0.0.1:{port}"
