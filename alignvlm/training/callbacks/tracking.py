"""Tells the tracker when there is something to deliver; `alignvlm.training.tracking` delivers it."""

from __future__ import annotations

from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord
from alignvlm.training.tracking.tracker import Tracker


class Tracking(Callback):
    """One delivery per tracking interval and at both ends of the stage, on rank 0."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def on_start(self, state: StageState) -> None:
        self._tracker.notify()

    def on_step(self, state: StageState, record: StepRecord) -> None:
        if state.step % state.recipe.tracking.interval == 0:
            self._tracker.notify()

    def on_end(self, state: StageState) -> None:
        self._tracker.notify()
