"""MLflow as a mirror of the run folder: deliveries that die half-way, no point twice, entries that MLflow refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from mlflow import MlflowClient, MlflowException

from alignvlm.run_folder import Run
from alignvlm.training.tracking.entries import clean_key, clean_text
from alignvlm.training.tracking.upload import upload
from tests.jobs import copy_store
from tests.training.tracking.conftest import delivered, log_steps, mirror_of


def test_points_arrive_once_whatever_dies_in_between(run_folder: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    log_steps(run_folder, 1, 40)
    mirror = mirror_of(run_folder)
    monkeypatch.setattr(mirror, "_remember", lambda: None)  # dies before it can note what it sent
    mirror.sync()
    log_steps(run_folder, 41, 50)
    again = mirror_of(run_folder)
    again.state["key"] = mirror.state["key"]  # noted before anything was sent
    again.sync()
    again.sync()
    assert delivered(again) == [(s, 1 / s) for s in range(1, 51)]
    experiment = again.client.get_experiment_by_name("tiny")
    assert len(again.client.search_runs([experiment.experiment_id])) == 2


def test_steps_taken_again_after_a_resume_are_not_sent_again(run_folder: Run) -> None:
    log_steps(run_folder, 1, 30)
    mirror_of(run_folder).sync()
    lines = run_folder.folder.metrics.read_text().splitlines(keepends=True)
    run_folder.folder.metrics.write_text("".join(lines[:20]))
    log_steps(run_folder, 21, 40)
    mirror = mirror_of(run_folder)
    mirror.sync()
    assert [step for step, _ in delivered(mirror)] == list(range(1, 41))


def test_the_goodput_so_far_is_sent_at_every_start_of_a_stage(run_folder: Run) -> None:
    log_steps(run_folder, 1, 10, seconds=0.75, data_wait=0.25)
    for _ in range(2):
        with run_folder.folder.attempts.open("a") as file:
            file.write('{"stage": "connector", "resumed_at": 0}\n')
        mirror = mirror_of(run_folder)
        mirror.sync()
        mirror.sync()
        log_steps(run_folder, 11, 20, seconds=1.0, data_wait=0.0)
    history = mirror.client.get_metric_history(mirror.state["parent"], "goodput/ettr")
    assert [(m.step, m.value) for m in history] == [(1, 5 / 9.75), (2, 15 / 19.75)]
    values = mirror.client.get_run(mirror.state["parent"]).data.metrics
    assert (values["goodput/data_wait_seconds"], values["goodput/unknown_seconds"]) == (2.5, 2.25)


def test_the_environment_variables_of_mlflow_are_honoured(run_folder: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "from-environment")
    monkeypatch.setenv("MLFLOW_TAGS", '{"team": "documents"}')
    mirror = mirror_of(run_folder)
    mirror.sync()
    run = mirror.client.get_run(mirror.state["parent"])
    assert run.data.tags["team"] == "documents"
    assert MlflowClient(mirror.target.uri).get_experiment(run.info.experiment_id).name == "from-environment"
    with pytest.raises(MlflowException):
        mirror.client.get_run("no-such-run")


def test_what_mlflow_does_not_take_stops_nothing_else(
    run_folder: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names, lengths and values of every kind; the config has a source `llava+next (v2)` and 300 more settings."""
    monkeypatch.setenv("MLFLOW_TAGS", '{"' + "k" * 300 + '": 1, "team": "documents"}')
    config = run_folder.folder.config
    more = {f"key {i}": i for i in range(300)} | {"llava+next (v2)": "x" * 9000, "../..": 1, "a//b": "\0", "n" * 400: 2}
    config.write_text(config.read_text() + f"extra: {json.dumps(more)}\n")
    log_steps(
        run_folder, 1, 3, **{
            "loss of a+b (c)": math.nan, "up": math.inf, "down": -math.inf, "huge": 10**400, "text": "no number",
            "none": None, "list": [1], "/abs": 1.5, "x" * 300: 2.5, "ok": True,
        },
    )  # fmt: skip
    with run_folder.folder.metrics.open("a") as file:
        file.write('{"stage": 3}\n{"step": 4, "stage": "connector", "time": "noon", "loss": 0.25}\n')
    results = run_folder.stage_folders()[1].evaluation.results
    results.parent.mkdir(parents=True)
    results.write_text(json.dumps({"tasks": {"task (1)": {"em": 0.5, "note": "text"}}}))
    benchmarks = run_folder.stage_folders()[1].benchmarks
    benchmarks.path.mkdir(parents=True)
    scores = {"scores": {"f1.a": 12.5}}
    benchmarks.results.write_text(json.dumps({"benchmarks": {"deepform": scores}, "paper_average": None}))
    upload(run_folder)
    mirror = mirror_of(run_folder)
    parent = mirror.client.get_run(mirror.state["parent"]).data
    assert parent.tags["team"] == "documents"
    assert parent.params["seed"] == "7"
    assert parent.params["extra/key 299"] == "299"
    assert parent.params["extra/llava_next _v2_"] == "x" * 6000
    assert {value for key, value in parent.params.items() if key.startswith("extra/n")} == {"2"}
    values = mirror.client.get_run(mirror.state["stages"]["connector"]).data.metrics
    assert math.isnan(values["loss of a_b _c_"])
    assert values["up"] > 1e300
    assert values["down"] < -1e300
    assert {key: values[key] for key in ("_/abs", "ok", "eval/task _1_/em", "benchmark/deepform/f1.a")} == {
        "_/abs": 1.5, "ok": 1.0, "eval/task _1_/em": 0.5, "benchmark/deepform/f1.a": 12.5,
    }  # fmt: skip
    assert [step for step, _ in delivered(mirror)] == [1, 2, 3, 4]
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("MLflow")]
    assert "does not take 'kkk" in line


@pytest.mark.parametrize("key", ["a", "..", "/", "a/../b", "a//b", "./a", "a\n", "é+", "x" * 1000, "", "a/", "\ud800"])
def test_clean_keys_are_valid_and_stay_as_they_are(key: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    clean = clean_key(key)
    _validate_metric_name(clean)
    assert len(clean) <= 250
    assert clean_key(clean) == clean
    clean_text(key).encode()


@pytest.mark.parametrize("content", ["", "{", "null", '{"stages": []}', "\x00\x00"])
def test_a_damaged_memory_is_made_anew(run_folder: Run, content: str, caplog: pytest.LogCaptureFixture) -> None:
    run_folder.folder.mlflow_state.write_text(content)
    log_steps(run_folder, 1, 2)
    for _ in range(2):
        mirror = mirror_of(run_folder)
        mirror.sync()
    assert [step for step, _ in delivered(mirror)] == [1, 2]
    (warning,) = caplog.messages
    assert warning.startswith(f"{run_folder.folder.mlflow_state} ")


def test_another_database_gets_everything(run_folder: Run, tmp_path: Path) -> None:
    """Because the old one was lost; the same one would find its runs by their tag."""
    log_steps(run_folder, 1, 5)
    upload(run_folder)
    (tmp_path / "runs" / "mlflow.db").rename(tmp_path / "old.db")
    copy_store(tmp_path / "other")
    (tmp_path / "other" / "mlflow.db").rename(tmp_path / "runs" / "mlflow.db")
    mirror = mirror_of(run_folder)
    mirror.sync()
    assert [step for step, _ in delivered(mirror)] == [1, 2, 3, 4, 5]
