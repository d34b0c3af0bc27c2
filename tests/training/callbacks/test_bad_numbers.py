"""Bad numbers: counted, the run stopped after too many in a row, a spike sent back; all of it over a restart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.training.callbacks import StageState
from alignvlm.training.callbacks.bad_numbers import MIN_STEPS, WINDOW, BadNumbers, read_skips
from data_pipeline.errors import DataError
from tests.training.fakes import FakeStore, record, stage_state

NAN = float("nan")


def take(state: StageState, callback: BadNumbers, *losses: float) -> None:
    for loss in losses:
        state.step += 1
        callback.on_step(state, record(state.step, loss))


def restarted(callback: BadNumbers) -> BadNumbers:
    """Another process's callback, with the state that went through a checkpoint."""
    again = BadNumbers()
    again.load_state(json.loads(json.dumps(callback.state())))
    return again


def test_bad_steps_in_a_row_stop_the_run(recipe: Recipe, tmp_path: Path) -> None:
    state, callback = stage_state(recipe, tmp_path), BadNumbers()
    take(state, callback, NAN, NAN, 1.0, NAN, float("inf"))
    state.step = 6
    with pytest.raises(UserError, match="3 steps in a row up to step 6"):
        callback.on_step(state, record(6, 1.0, skipped=True))


def test_bad_steps_are_counted_on_after_a_restart(recipe: Recipe, tmp_path: Path) -> None:
    state, callback = stage_state(recipe, tmp_path), BadNumbers()
    take(state, callback, NAN, NAN)
    with pytest.raises(UserError, match="3 steps in a row up to step 3"):
        take(state, restarted(callback), NAN)


@pytest.mark.parametrize("restart", [False, True])
def test_a_spike_goes_back_to_the_last_checkpoint(recipe: Recipe, tmp_path: Path, restart: bool) -> None:
    store = FakeStore()
    store.newest_step = 8
    state, callback = stage_state(recipe, tmp_path, store=store), BadNumbers()
    take(state, callback, *[1.0] * MIN_STEPS, 2.9)
    assert state.stop_reason is None
    take(state, restarted(callback) if restart else callback, 3.1)
    assert state.stop_reason == (
        "loss 3.100 at step 12 against a median of 1.000: going back to step 8, steps 9 to 12 will be left out"
    )
    assert state.discard
    assert read_skips(state) == {8, 9, 10, 11}


def test_a_save_that_is_being_written_at_a_spike_is_where_the_run_goes_back_to(recipe: Recipe, tmp_path: Path) -> None:
    store = FakeStore()
    store.newest_step, store.pending_step = 8, 10
    state = stage_state(recipe, tmp_path, store=store)
    take(state, BadNumbers(), *[1.0] * 11, 3.1)
    assert "going back to step 10, steps 11 to 12 will be left out" in str(state.stop_reason)
    assert read_skips(state) == {10, 11}


def test_a_loss_is_no_spike_before_there_is_something_to_compare_it_with(recipe: Recipe, tmp_path: Path) -> None:
    state, callback = stage_state(recipe, tmp_path), BadNumbers()
    take(state, callback, *[1.0] * (MIN_STEPS - 1), 100.0)
    assert state.stop_reason is None
    assert read_skips(state) == set()


def test_the_window_holds_the_last_finite_losses(recipe: Recipe, tmp_path: Path) -> None:
    state, callback = stage_state(recipe, tmp_path), BadNumbers()
    losses = [1 + i / 1000 for i in range(WINDOW + 5)]
    take(state, callback, *losses, NAN)
    assert callback.state() == {"in_a_row": 1, "losses": losses[-WINDOW:]}
    again = restarted(callback)
    take(state, again, 1.5)
    assert again.state() == {"in_a_row": 0, "losses": [*losses[-WINDOW + 1 :], 1.5]}


@pytest.mark.parametrize("text", ["", "[1, 2", '[1, "2"]', '{"steps": [1]}', "\0\0\0"])
def test_a_damaged_list_of_skipped_steps_is_one_line(recipe: Recipe, tmp_path: Path, text: str) -> None:
    state = stage_state(recipe, tmp_path)
    state.folder.skipped_steps.write_text(text)
    with pytest.raises(
        DataError, match=r"skipped_steps\.json cannot be read \(.*\); it lists the steps left out"
    ) as caught:
        read_skips(state)
    assert "\n" not in str(caught.value)
