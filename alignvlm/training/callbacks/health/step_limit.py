"""How long a step may take before the monitor of its rank ends it: learned from the steps before.

The monitor (`system/monitor`) is a process beside each rank; this tells it about every step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Any

from alignvlm.system.monitor.heart import Limit
from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord
from data_pipeline.loading.collate import MicroBatch
from data_pipeline.stores.waiting.patience import patience_seconds

KNOWN = 20
"""Steps after which the usual one is known."""
STORE_SECONDS = 60.0
"""A step may take so much longer than the patience with a store lasts, so that its readers give up first."""
MAX_KEYS = 20
"""Most samples of a step that are named."""


class StepLimit(Callback):
    """Keeps the seconds of the last steps, also in checkpoints, and sets the limit of the section `steps`."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=50)
        self._ranks = 0
        self._is_first = True

    def state(self) -> dict[str, Any]:
        return {"ranks": self._ranks, "seconds": list(self._seconds)}

    def load_state(self, state: dict[str, Any]) -> None:
        self._ranks, self._seconds = int(state["ranks"]), deque(map(float, state["seconds"]), maxlen=50)

    def on_start(self, state: StageState) -> None:
        if self._ranks != state.world.size:  # steps take another time then
            self._seconds.clear()
        self._ranks, self._is_first = state.world.size, True
        self._set(state)

    def before_step(self, state: StageState, batches: Sequence[MicroBatch]) -> None:
        keys = [key for batch in batches for key in batch.keys][:MAX_KEYS]
        state.world.heart.note(f"{_name(state)}, samples {', '.join(keys) or '(none)'}")

    def on_step(self, state: StageState, record: StepRecord) -> None:
        self._seconds.append(round(record.seconds, 4))
        self._is_first = False
        self._set(state)
        state.world.heart.note(f"{_name(state)}, no samples yet (waiting for data)")

    def _set(self, state: StageState) -> None:
        """The first step of a start also compiles and allocates: it gets the time of a start."""
        wanted = state.recipe.resilience
        usual = median(self._seconds) if self._seconds else 0.0
        learned = Limit(
            wanted.step_factor * usual,
            f"resilience.step_factor is {wanted.step_factor:g}, the usual step takes {usual:.3g} s",
        )
        is_known = len(self._seconds) >= KNOWN and not self._is_first
        at_least = wanted.limit("step_minutes" if is_known else "start_up_minutes")
        state.world.heart.limits["steps"] = max(at_least, learned, _outage(state))


def _outage(state: StageState) -> Limit:
    """How long a store of the stage's data may not answer; no time where all of it lies in local folders."""
    is_far = any("://" in state.recipe.data.sources[name].folder for name in state.stage.mixture)
    seconds = patience_seconds() + STORE_SECONDS if is_far else 0.0
    return Limit(seconds, f"ALIGNVLM_PATIENCE is {patience_seconds():g}, for data in a store")


def _name(state: StageState) -> str:
    return f"step {state.step + 1} of stage {state.stage.name}"
