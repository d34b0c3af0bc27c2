"""The steps of a stage: who is called in which order, what ends them, what a callback and the record get."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.training import stage as stage_module
from alignvlm.training.callbacks import Callback, StageState
from alignvlm.training.callbacks.checkpoints import describe
from alignvlm.training.callbacks.metrics_log import MetricsLog
from alignvlm.training.checkpoints.store import CheckpointInfo
from alignvlm.training.record import StepRecord
from alignvlm.training.stage import check_agreement, moved_on_the_hub, resume_trainer, run_steps
from alignvlm.training.step import StepCounts, StepResult, Votes
from alignvlm.training.throughput import Speed
from data_pipeline.errors import DataError
from data_pipeline.loading.collate import MicroBatch
from data_pipeline.stores import hub
from tests.training.fakes import FakeWorld, micro_batch, stage_state


class Notes(Callback):
    """Writes down every call, and stops the stage after step `stop_after`."""

    def __init__(self, calls: list[Any], stop_after: int | None = None) -> None:
        self.calls, self.stop_after, self.records = calls, stop_after, list[StepRecord]()

    def on_start(self, state: StageState) -> None:
        self.calls.append("start")

    def before_step(self, state: StageState, batches: Sequence[MicroBatch]) -> None:
        assert [batch.step for batch in batches] == [state.step]
        self.calls.append(("before", state.step))

    def on_step(self, state: StageState, record: StepRecord) -> None:
        self.records.append(record)
        self.calls.append(("after", state.step))
        if state.step == self.stop_after:
            state.stop_reason = "enough"

    def on_end(self, state: StageState) -> None:
        self.calls.append("end")


class Loader:
    """The loader of a stage: notes its start."""

    def __init__(self, calls: list[Any], first: int) -> None:
        self.calls, self.first = calls, first

    def start(self) -> Loader:
        self.calls.append("loader")
        return self

    def __iter__(self) -> Any:
        return ([micro_batch([2, 3], step=step)] for step in range(self.first, 100))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls of loader and callbacks, in order; steps are taken by nobody."""
    noted: list[Any] = []
    counts = StepCounts(supervised=3, samples=4, tokens=192, tiles=1, attended=9)
    result = StepResult(0, 0.5, {"vision": 1e-3}, 1.5, counts, Votes(), False, 0.25)
    monkeypatch.setattr(stage_module, "train_step", lambda *arguments: result)
    speed = Speed(0.5, 384.0, 8.0, 0.1, 0.25, 1.0)
    monkeypatch.setattr(stage_module, "Throughput", lambda *a: SimpleNamespace(measure=lambda *a: speed))
    monkeypatch.setattr(stage_module.stage_data, "stage_loader", lambda *a, start_step, **k: Loader(noted, start_step))
    return noted


def state_of(recipe: Recipe, folder: Path, callback: Callback, **changes: Any) -> StageState:
    signals = SimpleNamespace(received=None, stepping=False)
    trainer = SimpleNamespace(config=None)
    return stage_state(recipe, folder, callbacks=[callback], signals=signals, trainer=trainer, **changes)


def test_loader_processes_start_before_callbacks_and_every_step_has_its_own_batches(
    recipe: Recipe, tmp_path: Path, calls: list[Any]
) -> None:
    state = state_of(recipe, tmp_path, Notes(calls), step=2, num_steps=4)
    run_steps(state)
    steps = [("before", 2), ("after", 3), ("before", 3), ("after", 4)]
    assert calls == ["loader", "start", *steps, "end"]
    assert (state.step, state.stop_reason, state.signals.stepping) == (4, None, False)


def test_the_record_says_what_the_step_did(recipe: Recipe, tmp_path: Path, calls: list[Any]) -> None:
    callback = Notes(calls)
    state = state_of(recipe, tmp_path, callback, num_steps=2, checkpoint_stall=0.75)
    run_steps(state)
    first, second = callback.records
    assert (first.stage, first.step, first.loss, first.lr, first.grad_norm) == (
        "connector",
        1,
        0.5,
        {"vision": 1e-3},
        1.5,
    )
    assert (first.tokens, first.samples, first.supervised, first.tiles) == (192, 4, 3, 1)
    assert (first.seconds, first.tokens_per_second, first.data_wait) == (0.5, 384.0, 0.25)
    assert first.fill == 192 / (4 * 192)
    assert (first.checkpoint_stall, second.checkpoint_stall) == (0.75, 0.0)


def test_a_callback_stops_the_stage_after_its_step(recipe: Recipe, tmp_path: Path, calls: list[Any]) -> None:
    state = state_of(recipe, tmp_path, Notes(calls, stop_after=1))
    run_steps(state)
    assert calls == ["loader", "start", ("before", 0), ("after", 1), "end"]
    assert (state.step, state.stop_reason) == (1, "enough")


def test_an_early_end_finishes_the_stage_and_a_later_start_takes_no_step(
    recipe: Recipe, tmp_path: Path, calls: list[Any]
) -> None:
    class End(Notes):
        def on_step(self, state: StageState, record: StepRecord) -> None:
            super().on_step(state, record)
            if state.step == 2:
                state.end_early("no better")

    state = state_of(recipe, tmp_path, End(calls))
    run_steps(state)
    assert calls == ["loader", "start", ("before", 0), ("after", 1), ("before", 1), ("after", 2), "end"]
    assert (state.step, state.is_last_step, state.stop_reason) == (2, True, None)
    saved = describe(state)
    assert (saved["num_steps"], saved["ended_early"]) == (2, "no better")


def test_a_signal_at_another_rank_stops_the_stage(
    recipe: Recipe, tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = StepCounts(1, 1, 1, 1, 1)
    voted = StepResult(0, 0.5, {}, 1.0, counts, Votes(stop=1, written=1), False, 0.1)
    monkeypatch.setattr(stage_module, "train_step", lambda *arguments: voted)
    state = state_of(recipe, tmp_path, Notes(calls))
    run_steps(state)
    assert state.stop_reason == "signal at another rank"
    assert state.is_written


def test_left_out_steps_are_passed_over_also_at_the_end(recipe: Recipe, tmp_path: Path, calls: list[Any]) -> None:
    state = state_of(recipe, tmp_path, Notes(calls), num_steps=4)
    state.folder.skipped_steps.write_text("[0, 2, 3]")
    run_steps(state)
    assert calls == ["loader", "start", ("before", 1), ("after", 2), "end"]
    assert state.step == 4


def test_a_stage_without_steps_left_starts_no_loader(recipe: Recipe, tmp_path: Path, calls: list[Any]) -> None:
    run_steps(state_of(recipe, tmp_path, Notes(calls), step=4, num_steps=4))
    assert calls == ["start", "end"]


def test_callbacks_end_when_a_step_fails(
    recipe: Recipe, tmp_path: Path, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> StepResult:
        raise DataError("no data")

    monkeypatch.setattr(stage_module, "train_step", fail)
    state = state_of(recipe, tmp_path, Notes(calls))
    with pytest.raises(DataError, match="no data"):
        run_steps(state)
    assert calls == ["loader", "start", ("before", 0), "end"]
    assert not state.signals.stepping


def test_a_checkpoint_of_other_data_is_refused_before_the_engine_is_built(recipe: Recipe, tmp_path: Path) -> None:
    state = stage_state(recipe, tmp_path)
    found = CheckpointInfo(tmp_path / "step-00000005", {"step": 5, "position": {"step": 4}, "world_size": 1})
    store: Any = SimpleNamespace(newest=lambda warn: found)
    with pytest.raises(UserError, match=r"step-00000005: trained on other data or in another order: .*step 5 is now"):
        resume_trainer(state.run, state.stage, state.world, state.plan, store, state.timeline)


def test_other_data_of_a_branch_that_moved_names_the_commit_of_before(recipe: Recipe, tmp_path: Path) -> None:
    state, old, new = stage_state(recipe, tmp_path), "a" * 40, "b" * 40
    for commit in (old, new):
        with hub.held() as commits:
            commits["datasets/org/name@main"] = commit
            said = moved_on_the_hub(state.run.folder.attempts)
            MetricsLog().on_start(state)
            assert moved_on_the_hub(state.run.folder.attempts) == ""
    assert f"hf://datasets/org/name@main was at commit {old} and is at {new}: " in said
    assert f"(hf://datasets/org/name@{old})" in said


def test_ranks_that_see_other_data_are_named() -> None:
    world, plan = FakeWorld(size=4), SimpleNamespace(fingerprint="a")
    check_agreement(plan, world)  # type: ignore[arg-type]
    world.all_gather = lambda mine: [mine, "b", mine, "b"]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="ranks 1, 3 see other data than rank 0: manifests"):
        check_agreement(plan, world)  # type: ignore[arg-type]
