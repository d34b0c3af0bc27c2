"""TensorBoard and Weights & Biases beside MLflow, read back by their own readers: every step once, after any start."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alignvlm.checks import check_files
from alignvlm.cli import main
from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from alignvlm.run_folder import Run
from alignvlm.training.tracking.target import Target
from alignvlm.training.tracking.tracker import Tracker
from alignvlm.training.tracking.worker import Order, Worker
from tests.jobs import TINY
from tests.training.tracking.conftest import LOGIN, log_steps

SECRET_KEY = "k" * 40


@pytest.fixture
def run(run_folder: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    """The folder of a run with both; wandb asks no server."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", SECRET_KEY)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{LOGIN}127.0.0.1:9")
    tracking = replace(run_folder.recipe.tracking, also=["tensorboard", "wandb"])
    run = Run(replace(run_folder.recipe, tracking=tracking))
    run.open()
    return run


def worker_of(run: Run, tracker: str) -> Worker:
    return Worker(Order(Target.of(run, tracker), 60, 30, False, os.getpid()), io.StringIO())


def rewind(run: Run, lines: int) -> None:
    """As a start that resumes does: the lines after a checkpoint are gone."""
    metrics = run.folder.metrics
    kept = metrics.read_text().splitlines(keepends=True)[:lines]
    metrics.with_suffix(".new").write_text("".join(kept))
    os.replace(metrics.with_suffix(".new"), metrics)


def write_scores(run: Run, stage: str, score: float) -> None:
    folder = run.stage_folder(run.recipe.stages[stage]).evaluation
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.results.write_text(json.dumps({"tasks": {"fields": {"exact_match": score}}}))


def boards(run: Run) -> dict[str, EventAccumulator]:
    """Stage folder -> what TensorBoard reads there; one event file each."""
    found = {}
    for folder in sorted(run.folder.tensorboard.iterdir()):
        (file,) = folder.iterdir()
        found[folder.name] = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    return found


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """The records of a log in LevelDB's format: chunks of (checksum, length, type) and data in blocks of 32 KiB.

    wandb puts 7 bytes before it, which belong to the first block.
    """
    content, at, record = bytes(7) + content, 7, b""
    while at < len(content):
        if 2**15 - at % 2**15 < 7:
            at += 2**15 - at % 2**15
            continue
        length, kind = struct.unpack("<4xHB", content[at : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def wandb_history(run: Run) -> tuple[str, list[dict], dict]:
    """Run id, logged lines and summary of the offline folder, of which there is one."""
    from wandb.proto.wandb_internal_pb2 import Record

    (folder,) = run.folder.wandb.glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    names, rows, summary = set(), [], {}
    for data in leveldb_log(file.read_bytes()[7:]):
        record = Record.FromString(data)
        if record.HasField("run"):
            names.add(record.run.run_id)
        if record.HasField("history"):
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            rows.append(items | {"step": record.history.step.num})
        for item in record.summary.update:
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    (name,) = names
    return name, rows, summary


def test_tensorboard_shows_every_step_once_after_any_start(run: Run) -> None:
    log_steps(run, 1, 30)
    killed = worker_of(run, "tensorboard")
    assert killed.deliver()  # and is killed
    before = (run.folder.tensorboard / "1-connector" / "events.out.tfevents.alignvlm").read_bytes()
    rewind(run, 20)
    log_steps(run, 21, 35)
    log_steps(run, 35, 35, loss=9.0)  # a full disk left the line of a step twice
    worker = worker_of(run, "tensorboard")
    assert worker.deliver()
    log_steps(run, 36, 40)
    write_scores(run, "connector", 0.25)
    rewind(run, 41)  # the next stage's start writes the file anew, with the same lines
    log_steps(run, 1, 3, stage="instruct")
    assert worker.deliver()
    assert worker.deliver(last=True)
    read = boards(run)
    losses = [(e.step, e.value, e.wall_time) for e in read["1-connector"].Scalars("loss")]
    assert [step for step, _, _ in losses] == list(range(1, 41))
    for step, value, moment in losses:
        assert value == pytest.approx(9.0 if step == 35 else 1 / step)
        assert moment == 1e9 + step
    assert [e.value for e in read["1-connector"].Scalars("eval/fields/exact_match")] == [0.25]
    assert [e.step for e in read["2-instruct"].Scalars("lr/vision")] == [1, 2, 3]
    after = (run.folder.tensorboard / "1-connector" / "events.out.tfevents.alignvlm").read_bytes()
    assert after.startswith(before)  # a TensorBoard that is open reads on


def test_wandb_keeps_one_run_with_every_step_once(run: Run) -> None:
    """Offline: the folder of the last start has everything, those of earlier ones are gone."""
    log_steps(run, 1, 6)
    first = worker_of(run, "wandb")
    assert first.deliver(last=True)
    rewind(run, 4)
    log_steps(run, 5, 8)
    log_steps(run, 1, 2, stage="instruct")
    write_scores(run, "instruct", 0.5)
    again = worker_of(run, "wandb")
    assert again.deliver()
    log_steps(run, 3, 3, stage="instruct")
    assert again.deliver(last=True)
    name, rows, summary = wandb_history(run)
    assert name == json.loads(run.folder.wandb_state.read_text())["id"]
    assert [row["step"] for row in rows] == list(range(1, 12))
    assert [row["connector/loss"] for row in rows[:8]] == [1 / step for step in range(1, 9)]
    assert [(row["instruct/step"], row["instruct/loss"]) for row in rows[8:]] == [(s, 1 / s) for s in (1, 2, 3)]
    assert summary["instruct/eval/fields/exact_match"] == 0.5


@pytest.mark.slow
def test_all_trackers_of_a_training_get_everything_but_secrets(
    run: Run, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A server that is away keeps nothing from the others; `alignvlm track` gives them the rest."""
    monkeypatch.setattr("alignvlm.training.tracking.tracker.CLOSE_SECONDS", 240.0)
    log_steps(run, 1, 5)
    tracker = Tracker(run)
    tracker.notify()
    log_steps(run, 6, 10)
    assert not tracker.close()
    shown = "".join(capfd.readouterr())
    (line,) = shown.splitlines()
    assert line.startswith("MLflow at http://someone:***@127.0.0.1:9 does not answer; metrics wait on disk")
    assert [e.step for e in boards(run)["1-connector"].Scalars("loss")] == list(range(1, 11))
    assert [row["connector/step"] for row in wandb_history(run)[1]] == list(range(1, 11))
    log_steps(run, 11, 12)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    settings = [f"runs={run.recipe.runs}", "tracking.also=[tensorboard,wandb]"]
    assert main(["track", str(TINY), *settings]) == 0
    shown += "".join(capfd.readouterr())
    assert f"is up to date at tensorboard --logdir {run.folder.tensorboard}\n" in shown
    assert f"is up to date at wandb sync {run.folder.wandb}/offline-run-" in shown
    assert len(wandb_history(run)[1]) == 12
    for text in [shown.encode(), *(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())]:
        assert b"s3cr" not in text
        assert SECRET_KEY.encode() not in text


def test_a_missing_package_is_a_line_that_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything runs; and where it goes missing later, the training goes on."""
    recipe = load_recipe(str(TINY), ["tracking.also=[wandb]"])
    check_files(recipe)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking\.also: wandb is not installed here: pip install wandb"):
        check_files(recipe)
    log_steps(run, 1, 2)
    worker = worker_of(run, "tensorboard")
    assert not worker.deliver()
    assert not worker.deliver()
    (line,) = worker._output.getvalue().splitlines()
    reason = "TensorBoard is not installed here: pip install tensorboard"
    assert line == f"TensorBoard cannot be used; metrics wait on disk: {reason}"


class OnlineRun:
    """What the mirror takes of a wandb run, of which the server has the first four steps."""

    starting_step, offline, url, id = 5, False, "https://wandb.invalid/mine", "x"

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.summary: dict[str, float] = {}
        self.define_metric = lambda name, step_metric: None
        self.finish = lambda: None

    def log(self, values: dict[str, float], step: int, commit: bool) -> None:
        self.steps.append(step)


def test_online_only_what_the_server_lacks_is_sent(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    online = OnlineRun()
    monkeypatch.setattr("wandb.init", lambda **settings: online)
    log_steps(run, 1, 6)
    log_steps(run, 1, 2, stage="instruct")
    worker = worker_of(run, "wandb")
    assert worker.deliver(last=True)
    assert online.steps == [5, 6, 7, 8]


def test_a_wandb_that_knows_no_account_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    wandb.teardown()  # it reads its variables once
    request.addfinalizer(wandb.teardown)
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    worker = worker_of(run, "wandb")
    assert not worker.deliver()
    (line,) = worker._output.getvalue().splitlines()
    assert line.startswith("Weights & Biases cannot be used; metrics wait on disk: ")
    assert "wandb login" in line
