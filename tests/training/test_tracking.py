"""MLflow as a mirror of the run folder: a server that is away, deliveries that die half-way, no point twice."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient, MlflowException

from alignvlm.config import load_recipe
from alignvlm.launch.local import free_port
from alignvlm.run_folder import Run
from alignvlm.training.tracking.mirror import Mirror
from alignvlm.training.tracking.tracker import Tracker
from tests.jobs import TINY, copy_store


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in list(os.environ):
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    recipe = replace(load_recipe(str(TINY)), runs=str(tmp_path / "runs"))
    run = Run(recipe)
    run.open()
    copy_store(tmp_path / "runs")
    return run


def log_steps(run: Run, first: int, last: int, stage: str = "connector") -> None:
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
            file.write(json.dumps(record) + "\n")


def delivered(run: Run, mirror: Mirror, stage: str = "connector") -> list[tuple[int, float]]:
    history = mirror.client.get_metric_history(mirror.state["stages"][stage], "loss")
    return sorted((m.step, m.value) for m in history)


def test_points_arrive_once_whatever_dies_in_between(run_folder: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    log_steps(run_folder, 1, 40)
    mirror = Mirror(run_folder)
    monkeypatch.setattr(mirror, "_remember", lambda: None)  # dies before it can note what it sent
    mirror.sync()
    log_steps(run_folder, 41, 50)
    again = Mirror(run_folder)
    again.state["key"] = mirror.state["key"]  # noted before anything was sent
    again.sync()
    again.sync()
    assert delivered(run_folder, again) == [(s, 1 / s) for s in range(1, 51)]
    experiment = again.client.get_experiment_by_name("tiny")
    assert len(again.client.search_runs([experiment.experiment_id])) == 2


def test_steps_taken_again_after_a_resume_are_not_sent_again(run_folder: Run) -> None:
    log_steps(run_folder, 1, 30)
    Mirror(run_folder).sync()
    lines = run_folder.folder.metrics.read_text().splitlines(keepends=True)
    run_folder.folder.metrics.write_text("".join(lines[:20]))
    log_steps(run_folder, 21, 40)
    mirror = Mirror(run_folder)
    mirror.sync()
    assert [step for step, _ in delivered(run_folder, mirror)] == list(range(1, 41))


@pytest.fixture
def server(tmp_path: Path) -> tuple[str, list[str], dict[str, str]]:
    """URI, command and environment of a tracking server that is not running yet."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{tmp_path / 'server.db'}",
        "--artifacts-destination", str(tmp_path / "artifacts"), "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
    return f"http://127.0.0.1:{port}", command, os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def wait_until_it_listens(uri: str, timeout: float = 90) -> None:
    port = int(uri.rsplit(":", 1)[1])
    deadline = time.monotonic() + timeout
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline, "the MLflow server did not start"
        time.sleep(0.2)


@pytest.mark.slow
def test_a_real_server_that_comes_late_gets_everything(
    run_folder: Run, server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri, command, environment = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("alignvlm.training.tracking.tracker.RETRY_SECONDS", 0.5)
    began = time.monotonic()
    tracker = Tracker(run_folder)
    tracker.start()
    log_steps(run_folder, 1, 25)
    tracker.notify()
    assert time.monotonic() - began < 2  # nobody waits for the server
    deadline = time.monotonic() + 60
    while "does not answer" not in capsys.readouterr().err:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        wait_until_it_listens(uri)
        log_steps(run_folder, 26, 50)
        tracker.close()
        mirror = Mirror(run_folder)
        assert [step for step, _ in delivered(run_folder, mirror)] == list(range(1, 51))
        assert mirror.client.get_run(mirror.state["parent"]).data.params["seed"] == "7"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_server_that_never_comes_loses_nothing(run_folder: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr("alignvlm.training.tracking.tracker.CLOSE_SECONDS", 5.0)
    log_steps(run_folder, 1, 5)
    tracker = Tracker(run_folder)
    tracker.start()
    tracker.close()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mirror = Mirror(run_folder)
    mirror.sync()
    assert [step for step, _ in delivered(run_folder, mirror)] == [1, 2, 3, 4, 5]


def test_no_thread_is_left_while_the_tracker_pauses(run_folder: Run) -> None:
    before = set(threading.enumerate())
    tracker = Tracker(run_folder)
    assert set(threading.enumerate()) == before
    log_steps(run_folder, 1, 5)
    for _ in range(2):
        tracker.start()
        assert set(threading.enumerate()) > before
        tracker.pause()
        assert set(threading.enumerate()) == before
    log_steps(run_folder, 6, 10)
    tracker.close()
    assert set(threading.enumerate()) == before
    assert [step for step, _ in delivered(run_folder, Mirror(run_folder))] == list(range(1, 11))


def test_the_environment_variables_of_mlflow_are_honoured(run_folder: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from-environment")
    monkeypatch.setenv("MLFLOW_TAGS", '{"team": "documents"}')
    mirror = Mirror(run_folder)
    mirror.sync()
    run = mirror.client.get_run(mirror.state["parent"])
    assert run.data.tags["team"] == "documents"
    assert MlflowClient(mirror.uri).get_experiment(run.info.experiment_id).name == "from-environment"
    with pytest.raises(MlflowException):
        mirror.client.get_run("no-such-run")
