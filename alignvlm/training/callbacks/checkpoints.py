"""When to save: every so many steps, when a score improves, at the end of the stage, and before stopping early."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alignvlm.progress import say
from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord


class Checkpoints(Callback):
    """Begins saves on time and finishes them when all ranks have written; a failed one never ends the training.

    The sum that every step makes anyway tells the ranks when all of them have written, and when rank 0 has made a
    checkpoint of it (`state.is_written`).
    """

    def on_start(self, state: StageState) -> None:
        state.store.attach(state.trainer.engine)

    def on_step(self, state: StageState, record: StepRecord) -> None:
        due = state.step % state.recipe.checkpoint.every_steps == 0
        must = state.is_last_step or state.stop_reason is not None
        is_scored = state.recipe.checkpoint.keep_best in state.scores
        if not (state.is_written or due or must or is_scored):
            return
        with standing_still(state):
            finish_save(state, wait=due or must or is_scored)
            best = is_scored and state.store.is_best(state.scores, state.step)
            if (due or must or best) and not state.discard:
                _complain(state, state.store.begin(state.trainer.engine, describe(state)))
                if must or not state.recipe.checkpoint.background:
                    finish_save(state)

    def on_end(self, state: StageState) -> None:
        state.store.close()


@contextmanager
def standing_still(state: StageState) -> Iterator[None]:
    """Training waits for a checkpoint meanwhile."""
    began = time.perf_counter()
    with state.timeline.during("save"):
        yield
    state.checkpoint_stall += time.perf_counter() - began


def finish_save(state: StageState, wait: bool = True) -> None:
    """Bring a pending save to its end, or as far as it is without waiting; a failed one is a warning."""
    _complain(state, state.store.finish(wait=wait))


def _complain(state: StageState, problem: str | None) -> None:
    if problem is not None and state.world.is_main:
        say(f"WARNING: no checkpoint at step {state.step}, the previous one stays valid: {problem}")


def describe(state: StageState) -> dict[str, Any]:
    """What `state.json` of a checkpoint says, beside its format."""
    scores = {name: score if math.isfinite(score) else None for name, score in state.scores.items()}
    return (
        {
            "stage": state.stage.name,
            "step": state.step,
            "world_size": state.world.size,
            "num_steps": state.num_steps,
            "position": state.plan.position(state.step).to_json(),
            "callbacks": {callback.name: kept for callback in state.callbacks if (kept := callback.state())},
        }
        | ({"scores": scores} if scores else {})
        | ({"ended_early": state.ended_early} if state.ended_early else {})
    )
