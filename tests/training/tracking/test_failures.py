"""Servers and databases that fail in every way: one line that says how, soon, without secrets; nothing is lost."""

from __future__ import annotations

import io
import os
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alignvlm.errors import UserError
from alignvlm.launch.local import free_port
from alignvlm.run_folder import Run
from alignvlm.training.tracking.target import Target
from alignvlm.training.tracking.upload import upload
from alignvlm.training.tracking.worker import Order, Worker
from tests.jobs import TINY, job_environment
from tests.training.tracking.conftest import LOGIN, answer, delivered, log_steps, mirror_of, reset, serving, trickle

JSON_ERROR = '{"error_code": "PERMISSION_DENIED", "message": "not\\nyours"}'
ANSWERS: dict[str, tuple[Callable, str]] = {
    "500": (answer(500), "answers with HTTP 500"),
    "503": (answer(503, Retry_After="3600"), "answers with HTTP 503"),
    "429": (answer(429, Retry_After="3600"), "answers with HTTP 429"),
    "401": (answer(401, "Unauthorized"), "answers with HTTP 401; metrics wait on disk: Unauthorized"),
    "403": (answer(403), "answers with HTTP 403; metrics wait on disk: check MLFLOW_TRACKING_USERNAME"),
    "403 of MLflow": (answer(403, JSON_ERROR), "refuses the delivery; metrics wait on disk: PERMISSION_DENIED: not"),
    "404": (answer(404), "answers with HTTP 404; metrics wait on disk: is this the address of an MLflow server?"),
    "login page": (answer(200), "answers with a page that is not MLflow's"),
    "redirect without end": (answer(302, Location="/login"), "answers with redirects without end"),
    "reset": (reset, "closes the connection"),
    "no response": (lambda handler: None, "closes the connection"),
    "echo of the password": (answer(403, f"no entry for {LOGIN}"), "no entry for someone:***@"),
    "empty": (answer(200, ""), "cannot be used; metrics wait on disk: it sent a run without an id"),
}


def deliver(run: Run, monkeypatch: pytest.MonkeyPatch, uri: str) -> str:
    """What the worker of a training says about this server; the delivery fails."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    output = io.StringIO()
    worker = Worker(Order(Target.of(run), 60, 30, False, os.getpid()), output)
    began = time.monotonic()
    assert not worker.deliver()
    assert not worker.deliver()  # it says so once
    assert time.monotonic() - began < 15
    (line,) = output.getvalue().splitlines()
    assert line.startswith(f"MLflow at {uri.replace(LOGIN, 'someone:***@')} ")
    assert "s3cr" not in line
    return line


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_none_of_mlflow(run_folder: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    behaviour, words = ANSWERS[name]
    with serving(behaviour) as address:
        line = deliver(run_folder, monkeypatch, f"http://{LOGIN}{address}")
        assert words in line
        assert "does not answer" not in line
        with pytest.raises(UserError) as error:  # as `alignvlm track` does
            upload(run_folder)
    assert "\n" not in str(error.value)
    assert "s3cr" not in str(error.value)


def test_no_answer(run_folder: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody listens, or nobody accepts; afterwards another server gets everything."""
    log_steps(run_folder, 1, 5)
    line = deliver(run_folder, monkeypatch, f"http://127.0.0.1:{free_port()}")
    assert "does not answer; metrics wait on disk" in line
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "does not answer" in deliver(run_folder, monkeypatch, uri)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mirror = mirror_of(run_folder)
    mirror.sync()
    assert [step for step, _ in delivered(mirror)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("nonsense://x", "refuses the delivery"),
        ("mysql://someone:s3cr@/t@127.0.0.1:1/x", "cannot be used"),  # its driver is not among what the tests install
        ("postgresql:/someone:s3cret@127.0.0.1:1/x", "postgresql:/someone:***@127.0.0.1:1/x cannot be used"),
        ("http://", "does not answer"),
        ("http://someone:***@127.0.0.1:1", "the secret is masked in this copy of a recipe; set MLFLOW_TRACKING_URI"),
    ],
)
def test_uris_that_cannot_be(run_folder: Run, monkeypatch: pytest.MonkeyPatch, uri: str, words: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError) as error:
        upload(run_folder)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert "s3cr" not in str(error.value)


def test_tls_that_is_none(run_folder: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(answer(200)) as address:
        line = deliver(run_folder, monkeypatch, f"https://{LOGIN}{address}")
    assert "cannot be reached over TLS" in line


@pytest.mark.slow
def test_track_gives_a_trickling_server_up(run_folder: Run) -> None:
    """In a process of its own, which ends; the limit is shortened."""
    program = (
        "import sys; from alignvlm.training.tracking import upload; upload.CALL_SECONDS = 1.5; "
        "from alignvlm.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    with serving(trickle) as address:
        ended = subprocess.run(
            [sys.executable, "-c", program, "track", str(TINY), f"runs={run_folder.recipe.runs}"],
            env=job_environment(MLFLOW_TRACKING_URI=f"http://{LOGIN}{address}"), capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "does not answer within 1.5 s" in line
    assert "s3cr" not in line


def test_a_database_that_is_none(run_folder: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Garbage, a file cut short, or one that another process holds: one line, soon."""
    monkeypatch.setattr("alignvlm.training.tracking.database.LOCK_SECONDS", 0.2)
    log_steps(run_folder, 1, 3)
    database = tmp_path / "runs" / "mlflow.db"
    good = database.read_bytes()
    for content in (b"garbage" * 1000, good[:5000], good[: len(good) // 2]):
        database.write_bytes(content)
        began = time.monotonic()
        output = io.StringIO()
        assert not Worker(Order(Target.of(run_folder), 60, 30, False, os.getpid()), output).deliver()
        assert time.monotonic() - began < 10
        (line,) = output.getvalue().splitlines()
        assert "cannot be used; metrics wait on disk" in line
    database.unlink()
    database.write_bytes(good)
    holder = sqlite3.connect(database)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="another process holds it"):
        upload(run_folder)
    holder.close()
    upload(run_folder)
    assert [step for step, _ in delivered(mirror_of(run_folder))] == [1, 2, 3]
