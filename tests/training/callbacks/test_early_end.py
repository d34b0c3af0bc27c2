"""When patience ends a stage: what counts as an improvement, what a restart remembers, who decides, what is noted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, cast

from alignvlm.config import load_recipe
from alignvlm.report.run_data import ATTEMPTS_LINE
from alignvlm.training.callbacks import StageState
from alignvlm.training.callbacks.early_end import EarlyEnd
from alignvlm.training.callbacks.metrics_log import MetricsLog
from alignvlm.training.distributed import World
from data_pipeline.files import read_json_lines
from tests.jobs import TINY
from tests.training.fakes import FakeWorld, record, stage_state


def state_of(folder: Path, *settings: str, **changes: Any) -> StageState:
    recipe = load_recipe(str(TINY), ["checkpoint.keep_best=loss/held_out", "evaluation.loss.sources=[test]", *settings])
    return stage_state(recipe, folder, **changes)


def validate(callback: EarlyEnd, state: StageState, *losses: float) -> list[float]:
    """Take a step with each of these held-out losses; what its line of metrics.jsonl counts."""
    counts = []
    for loss in losses:
        state.step, state.scores, line = state.step + 1, {"loss/held_out": loss}, record()
        callback.on_step(state, line)
        counts.append(line.extra["validations_without_improvement"])
    return counts


def test_a_stage_ends_after_so_many_validations_without_a_better_loss(tmp_path: Path) -> None:
    state, callback = state_of(tmp_path, "checkpoint.patience=3"), EarlyEnd()
    assert validate(callback, state, 3.0, 2.0, 2.0, math.nan, 1.9, 2.0, 1.9) == [0, 0, 1, 2, 0, 1, 2]
    assert state.ended_early is None
    state.scores = {"loss/charts": 5.0}  # another score, and a step without any
    callback.on_step(state, line := record())
    assert line.extra == {}
    validate(callback, state, math.inf)
    assert state.ended_early == "loss/held_out has not improved on 1.9 in 3 validations"
    assert state.is_last_step


def test_only_improvements_by_more_than_min_delta_count_and_small_ones_add_up(tmp_path: Path) -> None:
    state = state_of(tmp_path, "checkpoint.patience=2", "checkpoint.min_delta=0.25")
    assert validate(EarlyEnd(), state, 3.0, 2.875, 2.625, 2.375, 2.25) == [0, 1, 0, 1, 0]
    assert validate(EarlyEnd(), state, 2.0, 1.75, 1.75) == [0, 1, 2]
    assert state.ended_early == "loss/held_out has not improved on 2 by more than 0.25 in 2 validations"


def test_a_restart_goes_on_counting(tmp_path: Path) -> None:
    first, again = EarlyEnd(), EarlyEnd()
    assert first.state() == {}
    state = state_of(tmp_path, "checkpoint.patience=2")
    validate(first, state, 2.0, 2.5)
    again.load_state(json.loads(json.dumps(first.state())))
    assert validate(again, state, 2.5) == [2]
    assert state.ended_early


def test_without_patience_a_stage_never_ends_early(tmp_path: Path) -> None:
    state, callback, line = state_of(tmp_path), EarlyEnd(), record()
    for _ in range(9):
        state.scores = {"loss/held_out": math.nan}
        callback.on_step(state, line)
    assert (state.ended_early, line.extra, callback.state()) == (None, {}, {})


def test_rank_0_decides(tmp_path: Path) -> None:
    class Other(FakeWorld):
        def broadcast(self, value: Any) -> Any:
            return not value

    state = state_of(tmp_path, "checkpoint.patience=9", world=cast(World, Other(size=2, rank=1)))
    validate(EarlyEnd(), state, 2.0)
    assert state.ended_early


def test_a_spike_wins_over_the_end(tmp_path: Path) -> None:
    state = state_of(tmp_path, "checkpoint.patience=1")
    state.discard = True
    validate(EarlyEnd(), state, math.nan)
    assert state.ended_early is None


def test_the_attempt_says_that_it_ended_the_stage(tmp_path: Path) -> None:
    state = state_of(tmp_path)
    for step in (0, 6):
        state.step, log = step, MetricsLog()
        log.on_start(state)
        if step:
            state.end_early("no better")
        log.on_end(state)
    lines = read_json_lines(state.run.folder.attempts, ATTEMPTS_LINE)
    assert [(line["resumed_at"], line.get("ended_early")) for line in lines] == [(0, None), (6, "step 6: no better")]


def test_another_score_after_a_restart_is_counted_anew(tmp_path: Path) -> None:
    first, again = EarlyEnd(), EarlyEnd()
    validate(first, state_of(tmp_path, "checkpoint.patience=2"), 1.0, 2.0)
    again.load_state(first.state())
    fewer = state_of(tmp_path, "checkpoint.patience=2", "evaluation.loss.max_packs=3")
    assert validate(again, fewer, 3.0, 2.5) == [0, 0]
