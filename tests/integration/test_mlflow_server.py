"""A training that is preempted, tracked by an MLflow server on PostgreSQL: one run, every number once, no secret."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import pytest
from mlflow import MlflowClient

from alignvlm.launch.local import free_port
from data_pipeline.files import read_json
from tests.cluster.postgres import dump, postgres
from tests.jobs import TINY, curve, run, start, wait_for_step

LOGIN, DATABASE = "login-s3cr%40t", "database-s3cr%40t"
"""Passwords as they stand in a URI."""
SECRETS = ("s3cr", "bG9naW4tczNj")  # as it is, and the login as HTTP sends it


@contextmanager
def mlflow_server(database: str, folder: Path) -> Iterator[str]:
    """`127.0.0.1:port` of `mlflow server` on a database."""
    port = free_port()
    command = [
        sys.executable, "-m", "mlflow", "server", "--artifacts-destination", str(folder), "--host", "127.0.0.1",
        "--port", str(port), "--workers", "1",
    ]  # fmt: skip
    environment = {"MLFLOW_BACKEND_STORE_URI": database, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(
        command, env=os.environ | environment, cwd=folder, start_new_session=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 180  # the tables of a new database
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None, "the MLflow server ended"
                assert time.monotonic() < deadline, "the MLflow server did not start"
                time.sleep(0.3)
        yield f"127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):  # it ended
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def delivered(client: MlflowClient, experiment: str) -> tuple[dict[str, str], dict[str, list[tuple[int, float]]]]:
    """Parent's tags, and stage -> (step, loss) of every point, of the one run that the experiment has."""
    found = client.get_experiment_by_name(experiment)
    runs = {each.info.run_name: each for each in client.search_runs([found.experiment_id])}
    assert sorted(runs) == ["tiny", "tiny/connector", "tiny/init", "tiny/instruct"]
    points = {
        name.partition("/")[2]: [(point.step, point.value) for point in client.get_metric_history(id_, "loss")]
        for name, id_ in ((name, each.info.run_id) for name, each in runs.items())
        if "/" in name
    }
    return runs["tiny"].data.tags, points


@pytest.mark.cluster
def test_two_attempts_are_one_run_on_postgresql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the server, and straight to its database; `alignvlm track` finds nothing that is missing or new."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    (server_files := tmp_path / "server").mkdir()
    folder = tmp_path / "runs" / "tiny"
    with postgres("database-s3cr@t") as database:
        direct = f"postgresql://mlflow:{DATABASE}@{database}/mlflow"
        with mlflow_server(direct, server_files) as server:
            settings = (str(TINY), "train.processes=1", f"tracking.uri=http://someone:{LOGIN}@{server}")
            first = start("train", *settings, cwd=tmp_path, new_store=True)
            wait_for_step(folder, "connector", 3, first, timeout=400)
            first.send_signal(signal.SIGTERM)
            shown, _ = first.communicate(timeout=240)
            assert first.returncode == 75, shown
            shown += run("train", *settings, cwd=tmp_path, new_store=True, timeout=400)
            shown += run("track", *settings, cwd=tmp_path)
            losses = {
                stage: [(step, loss) for name, step, loss, _ in curve(folder) if name == stage]
                for stage in ("connector", "instruct")
            }
            client = MlflowClient(f"http://{server}")
            tags, points = delivered(client, "tiny")
            assert {stage: points[stage] for stage in losses} == losses
            assert [step for step, _ in losses["connector"]] == list(range(1, 9))
            assert sorted(tag for tag in tags if tag.startswith("attempt.")) == [
                "attempt.001",
                "attempt.002",
                "attempt.003",
            ]
            assert read_json(folder / "finished.json", {"files": dict})  # sealed: MLflow has everything
        for _ in range(2):
            shown += run(
                "track", *settings[:2], cwd=tmp_path, MLFLOW_TRACKING_URI=direct, MLFLOW_EXPERIMENT_NAME="straight"
            )
        monkeypatch.setenv("PGPASSWORD", "database-s3cr@t")
        _, again = delivered(MlflowClient(direct), "straight")
        assert {stage: again[stage] for stage in losses} == losses
        held = dump(database, "database-s3cr@t")
    rows = Counter(line for line in held.splitlines() if line.startswith("INSERT INTO public.metrics"))
    assert sum("'loss'" in line for line in rows) == 2 * 12
    assert max(rows.values()) == 1
    assert f"is up to date at http://someone:***@{server}, run" in shown
    assert f"is up to date at postgresql://mlflow:***@{database}/mlflow, run" in shown
    files = {path: path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()}
    names = {path.name for path in files if folder in path.parents}
    assert {"config.yaml", "environment.json", "mlflow.json", "index.html", "results.json"} <= names
    for where, text in {"output": shown, "database": held, **files}.items():
        for secret in SECRETS:
            assert secret not in text, f"{where} holds a password"
