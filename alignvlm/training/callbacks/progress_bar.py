"""The progress bar of a stage: steps, loss, the last held-out loss, tokens per second, time left."""

from __future__ import annotations

from alignvlm.config.names import HELD_OUT
from alignvlm.progress import Progress
from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord


class ProgressBar(Callback):
    """Shown by rank 0 only."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._held_out = ""

    def on_start(self, state: StageState) -> None:
        self._held_out = ""
        title = f"stage {state.stage.number}/{len(state.recipe.stages)} {state.stage.name}"
        self._bar = Progress(title, state.num_steps, start=state.step, enabled=state.world.is_main)
        self._bar.__enter__()

    def on_step(self, state: StageState, record: StepRecord) -> None:
        if (held_out := record.extra.get(HELD_OUT)) is not None:
            self._held_out = f"held-out {held_out:.3f}  "
        if self._bar is not None:
            notes = f"loss {record.loss:.3f}  {self._held_out}{record.tokens_per_second:,.0f} tokens/s"
            self._bar.advance(notes=notes)

    def on_end(self, state: StageState) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
