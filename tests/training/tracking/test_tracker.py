"""The worker process of a training: it delivers, it waits for a server, it ends with the training."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from alignvlm.launch.local import free_port
from alignvlm.run_folder import Run
from alignvlm.training.tracking.tracker import Tracker
from alignvlm.training.tracking.worker import OVERDUE
from tests.training.tracking.conftest import LOGIN, delivered, log_steps, mirror_of, serving, trickle
from tests.waiting import runs, until

MODULE = "alignvlm.training.tracking.tracker"


@pytest.fixture
def server(tmp_path: Path) -> tuple[str, list[str], dict[str, str]]:
    """`host:port`, command and environment of a tracking server that is not running yet."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}",
        "--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
    return f"127.0.0.1:{port}", command, os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def wait_until_it_listens(address: str, timeout: float = 90) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + timeout
    while True:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        assert time.monotonic() < deadline, "the MLflow server did not start"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_real_server_that_comes_late_gets_everything_but_the_secret(
    run_folder: Run, server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The password reaches no file of the run or of MLflow, nor the output."""
    address, command, environment = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{LOGIN}{address}")
    monkeypatch.setattr(f"{MODULE}.RETRY_SECONDS", 0.5)
    monkeypatch.setattr(f"{MODULE}.CLOSE_SECONDS", 240.0)
    began = time.monotonic()
    tracker = Tracker(run_folder)
    log_steps(run_folder, 1, 25)
    tracker.notify()
    assert time.monotonic() - began < 2  # nobody waits for the server
    deadline = time.monotonic() + 60
    shown = ""
    while "does not answer" not in shown:
        assert time.monotonic() < deadline
        time.sleep(0.2)
        shown += capfd.readouterr().err
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        wait_until_it_listens(address)
        log_steps(run_folder, 26, 50)
        tracker.close()
        mirror = mirror_of(run_folder)
        assert [step for step, _ in delivered(mirror)] == list(range(1, 51))
        assert mirror.client.get_run(mirror.state["parent"]).data.params["seed"] == "7"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    (line,) = (shown + capfd.readouterr().err).splitlines()
    assert f"MLflow at http://someone:***@{address} does not answer; metrics wait on disk" in line
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "mlflow.json", "server.db"} <= {path.name for path in files}
    assert [path for path in files if b"s3cr" in path.read_bytes()] == []


def test_a_trickling_server_is_given_up(
    run_folder: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the middle of the training and at its end; the next start delivers everything."""
    monkeypatch.setattr(f"{MODULE}.CALL_SECONDS", 1.0)
    monkeypatch.setattr(f"{MODULE}.CLOSE_SECONDS", 5.0)
    monkeypatch.setattr(f"{MODULE}.RETRY_SECONDS", 0.0)
    log_steps(run_folder, 1, 5)
    with serving(trickle) as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{LOGIN}{address}")
        tracker = Tracker(run_folder)
        tracker.notify()
        (delivery,) = tracker._deliveries
        assert delivery._process is not None
        assert delivery._process.wait(60) == OVERDUE
        began = time.monotonic()
        tracker.close()
        assert time.monotonic() - began < 8
    (line,) = capfd.readouterr().err.splitlines()
    assert f"MLflow at http://someone:***@{address} does not answer within 1 s; metrics wait on disk" in line
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mirror = mirror_of(run_folder)
    mirror.sync()
    assert [step for step, _ in delivered(mirror)] == [1, 2, 3, 4, 5]


def test_no_process_and_no_thread_is_left(
    run_folder: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(f"{MODULE}.CLOSE_SECONDS", 240.0)
    before = set(threading.enumerate())
    tracker = Tracker(run_folder)
    log_steps(run_folder, 1, 5)
    tracker.notify()
    assert set(threading.enumerate()) == before  # loader processes are forked while it works
    log_steps(run_folder, 6, 10)
    tracker.close()
    (delivery,) = tracker._deliveries
    assert delivery._process is not None
    assert delivery._process.returncode == 0
    assert [step for step, _ in delivered(mirror_of(run_folder))] == list(range(1, 11))
    assert capfd.readouterr() == ("", "")


def test_an_abandoned_worker_has_ended_at_once_and_says_nothing(
    run_folder: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(run_folder)
    tracker.notify()
    tracker.abandon()
    (delivery,) = tracker._deliveries
    assert delivery._process is not None
    assert delivery._process.returncode == -signal.SIGKILL
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("/nowhere/python", "cannot start; metrics wait on disk: "),
        ("segfault", "died (exit code -11)"),
    ],
)
def test_a_worker_that_cannot_work_stops_nothing(
    run_folder: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path,
    program: str, words: str,
) -> None:  # fmt: skip
    (tmp_path / "segfault").write_text("#!/bin/sh\nkill -SEGV $$\n")
    (tmp_path / "segfault").chmod(0o755)
    monkeypatch.setattr(f"{MODULE}.sys.executable", str(tmp_path / program))
    tracker = Tracker(run_folder)
    for _ in range(3):
        tracker.notify()
    tracker.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert words in line


def test_the_worker_ends_with_a_training_that_is_killed(run_folder: Run) -> None:
    """Although a process that the training forked holds the worker's standard input open."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            tracker = Tracker(run_folder)
            tracker.notify()
            (delivery,) = tracker._deliveries
            assert delivery._process is not None
            os.write(writer, str(delivery._process.pid).encode())
            if os.fork() == 0:
                time.sleep(20)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    worker = int(os.read(reader, 20))
    until(lambda: not runs(worker), seconds=15)
