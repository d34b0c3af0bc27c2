"""Tells the tracker when there is something to deliver; `alignvlm.training.tracking` delivers it."""

from __future__ import annotations

from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord
from alignvlm.training.tracking.tracker import Tracker


class Tracking(Callback):
    """One delivery after the first step of a start, one per tracking interval and one at the stage's end, on rank 0.

    Not before the first step: the worker's start takes 1.8 s of CPU time, while the ranks build their engines.
    """

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._is_first = True

    def on_start(self, state: StageState) -> None:
        self._is_first = True

    def on_step(self, state: StageState, record: StepRecord) -> None:
        if self._is_first or state.step % state.recipe.tracking.interval == 0:
            self._tracker.notify()
        self._is_first = False

    def on_end(self, state: StageState) -> None:
        self._tracker.notify()
