"""Losses and gradients that are not finite, and losses that jump: count, stop, or go back.

DeepSpeed skips a step whose gradient is not finite on all ranks alike; here such steps are counted. All decisions come
from numbers that are equal on all ranks, so all ranks decide the same.
"""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any

from alignvlm.errors import UserError
from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.callbacks.checkpoints import finish_save, standing_still
from alignvlm.training.record import StepRecord
from data_pipeline.files import has_shape, must_write, read_needed, write_atomic

WINDOW = 50
"""Latest steps whose median loss a new loss is compared with."""
MIN_STEPS = 10
"""Steps that must have been seen before a loss counts as a spike."""


class BadNumbers(Callback):
    """Stops the run after too many skipped steps in a row; on a spike, sends it back and leaves out the packs."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def state(self) -> dict[str, Any]:
        return {"in_a_row": self._in_a_row, "losses": list(self._losses)}

    def load_state(self, state: dict[str, Any]) -> None:
        self._in_a_row = state["in_a_row"]
        self._losses = deque(state["losses"], maxlen=WINDOW)

    def on_step(self, state: StageState, record: StepRecord) -> None:
        limits = state.recipe.resilience
        bad = record.skipped or not math.isfinite(record.loss)
        self._in_a_row = self._in_a_row + 1 if bad else 0
        if self._in_a_row >= limits.max_bad_steps:
            raise UserError(
                f"stage {state.stage.name}: {self._in_a_row} steps in a row up to step {state.step} had a loss or "
                "gradient that is not finite; none of them changed a weight, and the last checkpoint is good. Lower "
                "the learning rate or raise resilience.max_bad_steps"
            )
        if bad:
            return
        if limits.spike_factor and len(self._losses) >= MIN_STEPS:
            usual = median(self._losses)
            if record.loss > limits.spike_factor * usual:
                self._roll_back(state, record.loss, usual)
        self._losses.append(record.loss)

    def _roll_back(self, state: StageState, loss: float, usual: float) -> None:
        """Leave out everything since the last checkpoint; the next start resumes there.

        A save that is still being written may become that checkpoint: it is waited for.
        """
        with standing_still(state):
            finish_save(state)
        newest = state.world.broadcast(state.store.newest_step)  # other hosts may see the new folder later
        state.stop_reason = (
            f"loss {loss:.3f} at step {state.step} against a median of {usual:.3f}: going back to step {newest}, "
            f"steps {newest + 1} to {state.step} will be left out"
        )
        state.discard = True
        if state.world.is_main:
            skips = read_skips(state) | set(range(newest, state.step))
            with must_write(state.folder.skipped_steps, "free some space and start again"):
                write_atomic(state.folder.skipped_steps, json.dumps(sorted(skips)) + "\n")


def read_skips(state: StageState) -> set[int]:
    """0-based steps of the stage's plan that are not trained on; empty when there never was a spike."""
    path = state.folder.skipped_steps
    way_out = "it lists the steps left out after a loss spike: restore it, or remove it to train on them"
    return read_needed(path, _read_steps, way_out) if path.exists() else set()


def agreed_skips(state: StageState) -> set[int]:
    """What rank 0 reads with `read_skips`, on all ranks: hosts may see a new file at different times."""
    return state.world.of_main(read_skips, state)


def _read_steps(path: Path) -> set[int]:
    steps = json.loads(path.read_bytes())
    if not has_shape(steps, [int]):
        raise ValueError("it holds no list of steps")
    return set(steps)
