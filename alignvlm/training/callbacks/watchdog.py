"""A step that never ends: who is behind, with which samples, and where every thread stands; then exit for a restart.

Each rank's thread writes a heartbeat file now and then. When this rank's step takes far longer than its predecessors,
the thread reads all heartbeats: ranks that have made fewer steps, or have not reached the waiting, are the culprits.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord
from data_pipeline.files import write_atomic
from data_pipeline.loading.collate import MicroBatch

HANG = 76
"""Exit code after a hang."""
MAX_KEYS = 20
BEAT_SECONDS = 5.0


class Watchdog(Callback):
    """One daemon thread per rank."""

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=50)
        self._beat: dict[str, Any] = {}
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def on_start(self, state: StageState) -> None:
        self._begin(state, [])
        self._thread = threading.Thread(target=self._watch, args=(state,), name="watchdog", daemon=True)
        self._thread.start()

    def before_step(self, state: StageState, batches: Sequence[MicroBatch]) -> None:
        self._begin(state, [key for batch in batches for key in batch.keys])

    def on_step(self, state: StageState, record: StepRecord) -> None:
        self._durations.append(time.monotonic() - self._beat["since"])
        self._begin(state, [], phase="between steps")

    def on_end(self, state: StageState) -> None:
        self._done.set()

    def _begin(self, state: StageState, keys: list[str], phase: str = "in a step") -> None:
        self._beat = {
            "rank": state.world.rank, "stage": state.stage.name, "step": state.step, "phase": phase,
            "since": time.monotonic(), "keys": keys[:MAX_KEYS],
        }  # fmt: skip

    def limit(self, state: StageState) -> float:
        """Seconds that a step may take."""
        limits = state.recipe.resilience
        usual = median(self._durations) if self._durations else 0.0
        return max(60 * limits.watchdog_minutes, limits.watchdog_factor * usual)

    def _watch(self, state: StageState) -> None:
        folder = state.run.folder.path / "heartbeats"
        folder.mkdir(parents=True, exist_ok=True)
        mine = folder / f"rank-{state.world.rank:05d}.json"
        interval = min(BEAT_SECONDS, 60 * state.recipe.resilience.watchdog_minutes / 4)
        while not self._done.wait(interval):
            seconds = time.monotonic() - self._beat["since"]
            write_atomic(mine, json.dumps(self._beat | {"seconds": seconds, "host": os.uname().nodename}))
            if seconds > self.limit(state):
                self._give_up(state, folder, seconds)

    def _give_up(self, state: StageState, folder: Path, seconds: float) -> None:
        time.sleep(min(BEAT_SECONDS, self.limit(state) / 2))  # the others write their last heartbeat meanwhile
        print(
            f"rank {state.world.rank}: step {self._beat['step'] + 1} of stage {state.stage.name} has taken "
            f"{seconds:.0f} s, the limit is {self.limit(state):.0f} s\n{describe_lag(folder, state.world.size)}",
            file=sys.stderr,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(HANG)


def describe_lag(folder: Path, world_size: int) -> str:
    """Which ranks are behind the others, in which phase and with which samples; ranks without a heartbeat first."""
    beats = []
    for rank in range(world_size):
        path = folder / f"rank-{rank:05d}.json"
        if not path.exists():
            return f"rank {rank} never wrote a heartbeat: it did not start"
        beats.append(json.loads(path.read_text()))
    last = max(b["step"] for b in beats)
    stuck_before = [b for b in beats if b["phase"] == "between steps"]
    behind = [b for b in beats if b["step"] < last] or (stuck_before if len(stuck_before) < len(beats) else [])
    if not behind:
        behind, text = beats, "all ranks are in the same step: a collective hangs, or the slowest of them computes\n"
    else:
        text = ""
    for beat in behind:
        keys = ", ".join(beat["keys"]) or "no samples yet (waiting for data)"
        text += (
            f"  lagging: rank {beat['rank']} on {beat['host']}, {beat['phase']} {beat['step'] + 1}, samples {keys}\n"
        )
    return text.rstrip()
