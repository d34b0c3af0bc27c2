"""Callbacks of a few lines: connector statistics, metrics.jsonl, the progress bar, tracking."""

from __future__ import annotations

import errno
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignvlm.config.schema import Recipe
from alignvlm.run_folder import METRICS_LINE
from alignvlm.training.callbacks.connector_statistics import ConnectorStatistics
from alignvlm.training.callbacks.metrics_log import MetricsLog, keep_until
from alignvlm.training.callbacks.progress_bar import ProgressBar
from alignvlm.training.callbacks.tracking import Tracking
from alignvlm.training.tracking.entries import metrics_of
from data_pipeline.files import read_json_lines, write_atomic, write_json_lines
from tests.fixtures.damage import full_disk
from tests.training.fakes import FakeWorld, record, stage_state


def test_statistics_are_asked_for_once_per_interval_and_reach_the_record(recipe: Recipe, tmp_path: Path) -> None:
    connector = SimpleNamespace(collect_statistics=False, last_statistics={})
    trainer = SimpleNamespace(model=SimpleNamespace(model=SimpleNamespace(connector=connector)))
    state, callback = stage_state(recipe, tmp_path, trainer=trainer), ConnectorStatistics()
    callback.before_step(state, [])
    assert not connector.collect_statistics  # step 1; the interval is 2
    state.step = 1
    callback.before_step(state, [])
    assert connector.collect_statistics
    connector.last_statistics = {"entropy": 2.0, "top_mass": 0.5}
    step = record(2)
    callback.on_step(state, step)
    assert step.extra == {"connector_entropy": 2.0, "connector_top_mass": 0.5}
    after = record(3)
    callback.on_step(state, after)
    assert after.extra == {}


def test_a_skipped_step_has_null_for_what_is_not_finite(recipe: Recipe, tmp_path: Path) -> None:
    state, log = stage_state(recipe, tmp_path), MetricsLog()
    log.on_start(state)
    log.on_step(state, replace(record(1, loss=math.nan, skipped=True), grad_norm=math.inf))
    log.on_end(state)
    assert "NaN" not in (text := state.run.folder.metrics.read_text())
    assert "Infinity" not in text
    (line,) = read_json_lines(state.run.folder.metrics, METRICS_LINE)
    assert (line["loss"], line["grad_norm"], line["skipped"]) == (None, None, True)
    assert "grad_norm" not in [name for name, _, _ in metrics_of(line)]  # MLflow gets no number
    keep_until(state.run.folder.metrics, state.run.folder.lost_steps, state.stage.name, 1)
    assert state.run.folder.metrics.read_text() == text


def test_metrics_are_lines_at_once_and_a_resumed_stage_drops_those_it_repeats(recipe: Recipe, tmp_path: Path) -> None:
    state = stage_state(recipe, tmp_path)
    log = MetricsLog()
    log.on_start(state)
    for step in range(1, 5):
        log.on_step(state, record(step))
        assert read_json_lines(state.run.folder.metrics)[-1] == record(step).to_json()
    log.on_end(state)
    state.step, again = 2, MetricsLog()
    again.on_start(state)
    again.on_step(state, record(3, loss=0.25))
    again.on_end(state)
    lines = [(line["step"], line["loss"]) for line in read_json_lines(state.run.folder.metrics)]
    assert lines == [(1, 1.0), (2, 1.0), (3, 0.25)]
    assert read_json_lines(state.run.folder.lost_steps) == [record(step).to_json() for step in (3, 4)]
    attempts = read_json_lines(state.run.folder.attempts)
    assert [(a["stage"], a["resumed_at"]) for a in attempts] == [("connector", 0), ("connector", 2)]


class FullLogFile(io.StringIO):
    """Standard output that goes to a file on a full disk."""

    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_stops_neither_metrics_nor_output(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignvlm.progress.LOG_SECONDS", 0.0)
    monkeypatch.setattr("sys.stdout", FullLogFile())
    state, log, bar = stage_state(recipe, tmp_path), MetricsLog(), ProgressBar()
    log.on_start(state)
    log.on_step(state, record(1))
    bar.on_start(state)
    with full_disk(state.run.folder.metrics.stat().st_size + 100):
        for step in range(2, 6):
            log.on_step(state, record(step))
            bar.on_step(state, record(step))
    assert [row["step"] for row in read_json_lines(state.run.folder.metrics)] == [1]
    log.on_step(state, record(6))
    log.on_end(state)
    assert read_json_lines(state.run.folder.metrics) == [record(step).to_json() for step in range(1, 7)]


def test_a_disk_that_fails_at_the_start_stops_nothing(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = stage_state(recipe, tmp_path, step=2)
    write_json_lines(state.run.folder.metrics, [record(step).to_json() for step in (1, 2, 3)])
    size, log = state.run.folder.metrics.stat().st_size, MetricsLog()
    with full_disk(20):
        log.on_start(state)
        log.on_step(state, record(3, loss=0.25))
    assert state.run.folder.metrics.stat().st_size == size
    log.on_end(state)
    assert [(row["step"], row["loss"]) for row in read_json_lines(state.run.folder.metrics)] == [
        (1, 1.0), (2, 1.0), (3, 1.0), (3, 0.25)
    ]  # fmt: skip
    assert "cannot be cut to step 2 of stage connector" in caplog.text
    assert "attempts.jsonl: 1 line(s) could not be written and are lost" in caplog.text


def test_other_ranks_write_no_metrics(recipe: Recipe, tmp_path: Path) -> None:
    state = stage_state(recipe, tmp_path, world=FakeWorld(size=2, rank=1))
    log = MetricsLog()
    log.on_start(state)
    log.on_step(state, record())
    log.on_end(state)
    assert not state.run.folder.metrics.exists()


def test_keep_until_keeps_other_stages_and_drops_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path, lost = tmp_path / "metrics.jsonl", tmp_path / "lost_steps.jsonl"
    rows = [{"stage": stage, "step": step} for stage in ("first", "second") for step in (1, 2, 3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"stage": "sec')
    keep_until(path, lost, "second", 1)
    assert read_json_lines(path) == rows[:4]
    assert path.read_text().endswith("\n")
    assert read_json_lines(lost) == rows[4:]
    keep_until(tmp_path / "missing.jsonl", lost, "second", 1)
    assert not (tmp_path / "missing.jsonl").exists()


@pytest.mark.parametrize("fails_at", ["lost_steps.jsonl", "metrics.jsonl"])
def test_a_kill_while_lost_steps_move_loses_and_doubles_none(
    fails_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lost = tmp_path / "metrics.jsonl", tmp_path / "lost_steps.jsonl"
    rows = [{"stage": "first", "step": step, "time": float(step)} for step in (1, 2, 3)]
    again = [row | {"time": row["time"] + 10} for row in rows[1:]]
    write_json_lines(path, rows)
    keep_until(path, lost, "first", 1)
    write_json_lines(path, [rows[0], *again])

    def killed(target: Path, content: str) -> None:
        if target.name == fails_at:
            raise KeyboardInterrupt
        write_atomic(target, content)

    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.files.write_atomic", killed)
        with pytest.raises(KeyboardInterrupt):
            keep_until(path, lost, "first", 1)
    assert read_json_lines(path) == [rows[0], *again]
    keep_until(path, lost, "first", 1)
    assert read_json_lines(path) == rows[:1]
    assert read_json_lines(lost) == [*rows[1:], *again]


def test_the_bar_begins_where_the_stage_resumes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("alignvlm.progress.LOG_SECONDS", 0.0)
    state, bar = stage_state(recipe, tmp_path, step=40), ProgressBar()
    bar.on_start(state)
    bar.on_step(state, record(41, loss=0.5))
    bar.on_end(state)
    shown = capsys.readouterr().out
    assert "stage 1/2 connector: 41/100  loss 0.500  50 tokens/s" in shown
    ProgressBar().on_end(state)  # an error before the start


class Calls:
    """A tracker that notes what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda: self.calls.append(name)


def test_the_tracker_hears_of_the_first_step_of_every_interval_and_of_the_end(recipe: Recipe, tmp_path: Path) -> None:
    tracker = Calls()
    state, callback = stage_state(recipe, tmp_path), Tracking(tracker)
    heard = []
    for _ in range(2):
        callback.on_start(state)
        heard.append(len(tracker.calls))
        for state.step in range(3, 7):  # the interval is 2
            callback.on_step(state, record(state.step))
            heard.append(len(tracker.calls))
        callback.on_end(state)
    assert heard == [0, 1, 2, 2, 3, 4, 5, 6, 6, 7]
    assert tracker.calls == ["notify"] * 8
