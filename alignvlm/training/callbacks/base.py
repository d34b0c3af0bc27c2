"""The interface of callbacks and what they see of a stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from alignvlm.config.schema import Recipe, StageConfig
from alignvlm.training.checkpoint import CheckpointStore
from alignvlm.training.distributed import World
from alignvlm.training.engine import Trainer
from alignvlm.training.run import Run


@dataclass
class StageState:
    """A stage while it trains. Callbacks read it; they change `stop_reason` only."""

    recipe: Recipe
    run: Run
    index: int
    name: str
    stage: StageConfig
    world: World
    trainer: Trainer
    plan: Any
    """The data plan (`data_pipeline.plan.Plan`)."""
    store: CheckpointStore
    num_steps: int
    step: int = 0
    """Optimizer steps done."""
    attempt: dict[str, Any] = field(default_factory=dict)
    """This start of the stage: world size and the step it resumed at."""
    stop_reason: str | None = None
    """Set to end the training after this step; equal on all ranks."""

    @property
    def is_last_step(self) -> bool:
        return self.step == self.num_steps


class Callback:
    """Hooks of a stage; each does nothing by default. They run on every rank."""

    def on_start(self, state: StageState) -> None:
        """Before the first step of this start; `state.step` is where it resumes."""

    def before_step(self, state: StageState) -> None:
        """Before the forward pass of step `state.step + 1`."""

    def on_step(self, state: StageState, record: dict[str, Any]) -> None:
        """After a step; `record` is its line of metrics.jsonl and may be added to."""

    def on_end(self, state: StageState) -> None:
        """After the last step of this start, also when an error ended it."""
