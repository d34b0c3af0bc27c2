"""How long a step may take: the time of a start at first, then learned, over restarts with as many ranks."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from alignvlm.config.schema import Recipe
from alignvlm.system.monitor.heart import SIZE, Heart, Limit, Pulse
from alignvlm.training.callbacks.health.step_limit import StepLimit
from tests.training.fakes import FakeWorld, micro_batch, record, stage_state

START, STEP, FACTOR = 600.0, 180.0, 20.0


def test_the_limit_is_learned_and_kept_and_forgotten_with_another_number_of_ranks(
    recipe: Recipe, tmp_path: Path
) -> None:
    state, callback = stage_state(recipe, tmp_path), StepLimit()
    limits = state.world.heart.limits
    callback.on_start(state)
    assert limits["steps"] == Limit(START, "resilience.start_up_minutes is 10")
    for seconds in [90.0] + [2.0] * 18:
        callback.on_step(state, replace(record(), seconds=seconds))
    assert limits["steps"].seconds == START  # 19 steps are too few
    callback.on_step(state, replace(record(), seconds=2.0))
    assert limits["steps"] == Limit(STEP, "resilience.step_minutes is 3")
    for _ in range(40):
        callback.on_step(state, replace(record(), seconds=12.0))
    assert limits["steps"] == Limit(FACTOR * 12.0, "resilience.step_factor is 20, the usual step takes 12 s")
    kept = json.loads(json.dumps(callback.state()))

    again = StepLimit()
    again.load_state(kept)
    again.on_start(state)
    assert limits["steps"].seconds == START  # its first step also compiles
    again.on_step(state, replace(record(), seconds=12.0))
    assert limits["steps"].seconds == FACTOR * 12.0

    more = stage_state(recipe, tmp_path, world=FakeWorld(size=4))
    again.on_start(more)
    again.on_step(more, replace(record(), seconds=1.0))
    assert more.world.heart.limits["steps"].seconds == START


def test_a_store_that_does_not_answer_is_no_hang_before_its_readers_give_up(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNVLM_PATIENCE", "500")
    state, callback = stage_state(recipe, tmp_path), StepLimit()
    sources, name = state.recipe.data.sources, next(iter(state.stage.mixture))
    monkeypatch.setitem(sources, name, replace(sources[name], folder="s3://bucket/shards"))
    callback.on_start(state)
    for _ in range(20):
        callback.on_step(state, replace(record(), seconds=2.0))
    assert state.world.heart.limits["steps"] == Limit(560.0, "ALIGNVLM_PATIENCE is 500, for data in a store")


def test_the_monitor_hears_of_every_step_with_its_samples(recipe: Recipe, tmp_path: Path) -> None:
    file = os.memfd_create("heart")
    os.ftruncate(file, SIZE)
    heart, pulse = Heart({}, file), Pulse(file)
    os.close(file)
    heart.enter("steps")
    state, callback = stage_state(recipe, tmp_path, step=6, world=FakeWorld(heart=heart)), StepLimit()
    callback.on_start(state)
    seen = [pulse.beats]
    callback.before_step(state, [micro_batch([3, 4]), micro_batch([])])
    seen.append(pulse.beats)
    assert pulse.text == ("steps", "step 7 of stage connector, samples s/0.tar/0, s/0.tar/1")
    assert pulse.limit == START
    state.step = 7
    callback.on_step(state, record())
    seen.append(pulse.beats)
    assert pulse.text[1].startswith("step 8 of stage connector, no samples yet")
    assert len(set(seen)) == 3
