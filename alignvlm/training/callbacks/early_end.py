"""Ends a stage whose score no longer improves. Off by default (`checkpoint.patience`)."""

from __future__ import annotations

from typing import Any

from alignvlm.best import is_better
from alignvlm.config.names import LOSS
from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord


class EarlyEnd(Callback):
    """Counts validations in a row without an improvement by more than `min_delta`; rank 0's word ends the stage.

    What the next score must beat is the last one that counted as an improvement: small steps add up.
    """

    def __init__(self) -> None:
        self._best: float | None = None
        self._in_a_row = 0
        self._measured: list[Any] = []
        """The score, and what it is measured on: a resume may change both, and then counts anew."""

    def state(self) -> dict[str, Any]:
        counted = self._best is not None or self._in_a_row
        return {"best": self._best, "in_a_row": self._in_a_row, "measured": self._measured} if counted else {}

    def load_state(self, state: dict[str, Any]) -> None:
        self._best, self._in_a_row, self._measured = state["best"], state["in_a_row"], state["measured"]

    def on_step(self, state: StageState, record: StepRecord) -> None:
        settings = state.recipe.checkpoint
        name = settings.keep_best
        if settings.patience is None or name is None or name not in state.scores:
            return
        loss = state.recipe.evaluation.loss
        measured = [name, *([loss.sources, loss.max_packs] if loss else [])]
        if measured != self._measured:
            self._measured, self._best, self._in_a_row = measured, None, 0
        score, delta = state.scores[name], settings.min_delta
        if is_better(name, score + delta if name.startswith(LOSS) else score - delta, self._best):
            self._best, self._in_a_row = score, 0
        else:
            self._in_a_row += 1
        record.extra["validations_without_improvement"] = self._in_a_row
        if state.world.broadcast(self._in_a_row >= settings.patience) and not state.discard:
            best = "was never a number" if self._best is None else f"has not improved on {self._best:.4g}"
            by = f" by more than {delta:g}" if delta else ""
            state.end_early(f"{name} {best}{by} in {self._in_a_row} validations")
