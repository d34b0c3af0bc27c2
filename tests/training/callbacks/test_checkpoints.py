"""When checkpoints are saved, and what state.json says: also the state of the other callbacks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from alignvlm.config import load_recipe
from alignvlm.config.schema import Recipe
from alignvlm.training.callbacks import Callback, StageState
from alignvlm.training.callbacks.checkpoints import Checkpoints, describe
from alignvlm.training.checkpoints.store import CheckpointInfo
from alignvlm.training.stage import restore_callbacks
from tests.jobs import TINY
from tests.training.fakes import FakeStore, record, stage_state


class Counter(Callback):
    """Counts steps."""

    def __init__(self) -> None:
        self.count = 0

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def calls_at(state: StageState, step: int) -> list[Any]:
    """What the callback asked of the store after that step: names only."""
    assert isinstance(state.store, FakeStore)
    state.step, state.store.calls = step, []
    Checkpoints().on_step(state, record(step))
    return [call if isinstance(call, str) else call[0] for call in state.store.calls]


def test_saves_begin_on_time_and_end_when_all_ranks_have_written(recipe: Recipe, tmp_path: Path) -> None:
    state = stage_state(recipe, tmp_path)  # every 2 steps
    assert calls_at(state, 1) == []
    assert calls_at(state, 2) == ["finish", "begin"]
    state.is_written = True
    assert calls_at(state, 3) == ["go on"]  # training does not wait
    assert state.checkpoint_stall > 0


def test_the_last_step_and_an_early_stop_wait_for_the_save(recipe: Recipe, tmp_path: Path) -> None:
    state = stage_state(recipe, tmp_path, num_steps=7)
    assert calls_at(state, 7) == ["finish", "begin", "finish"]
    state.stop_reason = "signal SIGTERM"
    assert calls_at(state, 3) == ["finish", "begin", "finish"]
    state.discard = True
    assert calls_at(state, 3) == ["finish"]


def test_a_score_that_improves_is_saved_at_its_step(tmp_path: Path) -> None:
    state = stage_state(
        load_recipe(str(TINY), ["checkpoint.keep_best=loss/held_out", "evaluation.loss.sources=[test]"]), tmp_path
    )
    state.scores = {"loss/charts": 1.0}
    assert calls_at(state, 1) == []
    state.scores = {"loss/held_out": 2.0, "loss/charts": math.nan}
    assert calls_at(state, 1) == ["finish"]
    assert isinstance(state.store, FakeStore)
    state.store.best = True
    assert calls_at(state, 1) == ["finish", "begin"]
    assert state.store.calls[-1][1]["scores"] == {"loss/held_out": 2.0, "loss/charts": None}
    state.discard = True
    assert calls_at(state, 1) == ["finish"]


def test_without_background_every_save_is_waited_for(tmp_path: Path) -> None:
    state = stage_state(load_recipe(str(TINY), ["checkpoint.background=false"]), tmp_path)
    assert calls_at(state, 2) == ["finish", "begin", "finish"]


def test_a_failed_save_is_a_warning(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = FakeStore()
    store.problem = "No space left on device"
    calls_at(stage_state(recipe, tmp_path, store=store), 2)
    assert "WARNING: no checkpoint at step 2, the previous one stays valid: No space left" in capsys.readouterr().out


def test_the_state_of_callbacks_is_saved_under_their_names_and_restored(recipe: Recipe, tmp_path: Path) -> None:
    counter = Counter()
    counter.count = 5
    saved = describe(stage_state(recipe, tmp_path, step=4, callbacks=[counter, Callback()]))
    assert saved == {
        "stage": "connector", "step": 4, "world_size": 1, "num_steps": 100, "position": {"step": 4},
        "callbacks": {"Counter": {"count": 5}},
    }  # fmt: skip
    again = Counter()
    restore_callbacks([Callback(), again], CheckpointInfo(tmp_path, saved))
    assert again.count == 5


def test_a_checkpoint_from_before_callbacks_had_state_restores_nothing(tmp_path: Path) -> None:
    counter = Counter()
    restore_callbacks([counter], CheckpointInfo(tmp_path, {"step": 4}))
    restore_callbacks([counter], None)
    assert counter.count == 0
