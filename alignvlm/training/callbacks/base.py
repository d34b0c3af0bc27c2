"""The interface of callbacks and what they see of a stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alignvlm.config.schema import Recipe, StageConfig
from alignvlm.model import AlignVLMProcessor
from alignvlm.run_folder import Run, StageFolder
from alignvlm.system.signals import Signals
from alignvlm.system.timeline import Timeline
from alignvlm.training.checkpoints.store import CheckpointStore
from alignvlm.training.distributed import World
from alignvlm.training.engine import Trainer
from alignvlm.training.record import StepRecord
from data_pipeline.loading.collate import MicroBatch
from data_pipeline.order.plan import Plan


@dataclass
class StageState:
    """A stage while it trains. Callbacks read it and set the fields from `checkpoint_stall` on."""

    recipe: Recipe
    run: Run
    stage: StageConfig
    folder: StageFolder
    world: World
    trainer: Trainer
    plan: Plan
    processor: AlignVLMProcessor
    store: CheckpointStore
    num_steps: int
    """Optimizer steps of the stage; `end_early` lowers it."""
    signals: Signals
    callbacks: Sequence[Callback]
    """All callbacks, in the order in which they are called."""
    step: int = 0
    """Optimizer steps done."""
    is_written: bool = False
    """All ranks have written the files of the save under way."""
    checkpoint_stall: float = 0.0
    """Seconds that training stood still for checkpoints since the last step."""
    shared: list[float] = field(default_factory=list)
    """Numbers that a callback sets before a step, equally many on all ranks; after it, their sums over the ranks."""
    scores: dict[str, float] = field(default_factory=dict)
    """Scores of the weights after this step (`loss/…`, `task/…`), empty at most steps; equal on all ranks. A checkpoint
    at this step keeps them, and `checkpoint.keep_best` chooses by them."""
    stop_reason: str | None = None
    """Set to end the training after this step; equal on all ranks."""
    discard: bool = False
    """Set with `stop_reason` when the steps since the last checkpoint are not to be kept."""

    timeline: Timeline = field(default_factory=Timeline)
    """What rank 0 is at."""
    ended_early: str | None = None
    """Why the stage ends before all of its data are trained on."""

    def end_early(self, reason: str) -> None:
        """Make this step the stage's last one; call it after a step, on every rank. The stage is finished then."""
        self.ended_early, self.num_steps = reason, self.step

    @property
    def is_last_step(self) -> bool:
        return self.step == self.num_steps


class Callback:
    """Hooks of a stage; each does nothing by default. They run on every rank.

    What a callback must remember over a restart it returns from `state`. Checkpoints keep that under the callback's
    `name`, and a stage that resumes gives it back to `load_state`.
    """

    @property
    def name(self) -> str:
        """Key of the callback's state in a checkpoint; no two callbacks of a run share one."""
        return type(self).__name__

    def state(self) -> dict[str, Any]:
        """What to keep in a checkpoint, as JSON; rank 0's is saved. Empty: nothing."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned when the checkpoint was saved, on every rank and before `on_start`.

        Not called in a stage's first start, nor when the checkpoint has nothing under this name.
        """

    def on_start(self, state: StageState) -> None:
        """Called before the first step of this start; `state.step` is where it resumes."""

    def before_step(self, state: StageState, batches: Sequence[MicroBatch]) -> None:
        """Called before the forward pass of step `state.step + 1` on these micro-batches of this rank."""

    def on_step(self, state: StageState, record: StepRecord) -> None:
        """Called after a step; `record` is its line of metrics.jsonl, and `record.extra` takes further numbers."""

    def on_end(self, state: StageState) -> None:
        """Called after the last step of this start, also when an error ended it, perhaps before `on_start`."""
