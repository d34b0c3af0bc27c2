"""When to save: every so many steps, at the end of the stage, and before stopping early."""

from __future__ import annotations

from typing import Any

from alignvlm.training.callbacks.base import Callback, StageState


class Checkpoints(Callback):
    """Saves engine, step and data position through the stage's `CheckpointStore`."""

    def on_step(self, state: StageState, record: dict[str, Any]) -> None:
        due = state.step % state.recipe.checkpoint.every_steps == 0
        if due or state.is_last_step or state.stop_reason:
            save(state)


def save(state: StageState) -> None:
    """One checkpoint of the stage as it is now."""
    state.store.save(
        state.trainer.engine,
        {
            "stage": state.name,
            "step": state.step,
            "world_size": state.world.size,
            "num_steps": state.num_steps,
            "position": state.plan.position(state.step).to_json(),
        },
    )
