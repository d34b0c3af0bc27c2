"""A step or save that never ends: who is behind, with which samples, where every thread stands; exit for a restart.

Each rank's thread posts a heartbeat now and then, in memory of rank 0's process. When this rank's step takes far longer
than those before, the thread reads all heartbeats: ranks that have made fewer steps, or are still waiting for data, are
the culprits.

A save for which training waits may take as long as it likes while any rank writes or checks bytes of it, and so may a
measurement of the held-out loss while this rank makes forward passes.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from statistics import median
from typing import Any

from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.distributed import World
from alignvlm.training.record import StepRecord
from data_pipeline.loading.collate import MicroBatch

HANG = 76
"""Exit code after a hang."""
MAX_KEYS = 20
BEAT_SECONDS = 5.0
STORE_SECONDS = 10.0
"""How long a rank waits for an answer of rank 0's process."""


class Heartbeats:
    """The last heartbeat of every rank. Neither a dead nor a frozen rank 0 stops the others from reporting."""

    def __init__(self, world: World, beat: dict[str, Any]) -> None:
        """Every rank calls it with its first heartbeat."""
        self._keys = [f"heartbeat/{rank}" for rank in range(world.size)]
        self._mine = self._keys[world.rank]
        self._store = world.open_store(timedelta(seconds=STORE_SECONDS))
        self.post(beat)
        world.barrier()  # all keys exist: reading them waits for none

    def post(self, beat: dict[str, Any]) -> None:
        """Replace this rank's heartbeat."""
        with contextlib.suppress(RuntimeError):  # rank 0 is gone; `read` says so when it matters
            self._store.set(self._mine, json.dumps(beat))

    def read(self) -> list[dict[str, Any]] | None:
        """All ranks' heartbeats, in rank order; None when rank 0 does not answer in time."""
        answer: list[dict[str, Any]] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answer.extend(json.loads(beat) for beat in self._store.multi_get(self._keys))

        # The store's own timeout does not cover every wait for a process that is stopped: hence a thread.
        asking = threading.Thread(target=ask, name="heartbeats", daemon=True)
        asking.start()
        asking.join(STORE_SECONDS)
        return answer or None


class Watchdog(Callback):
    """One daemon thread per rank."""

    def __init__(self) -> None:
        self._durations: deque[float] = deque(maxlen=50)
        self._beat: dict[str, Any] = {}
        self._saved, self._saved_at = -1, 0.0
        self._validated, self._validated_at = 0, 0.0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def on_start(self, state: StageState) -> None:
        self._begin(state, [])
        heartbeats = Heartbeats(state.world, self._heartbeat(state))
        self._thread = threading.Thread(target=self._watch, args=(state, heartbeats), name="watchdog", daemon=True)
        self._thread.start()

    def before_step(self, state: StageState, batches: Sequence[MicroBatch]) -> None:
        self._begin(state, [key for batch in batches for key in batch.keys])

    def on_step(self, state: StageState, record: StepRecord) -> None:
        self._durations.append(time.monotonic() - self._beat["since"])
        self._begin(state, [], phase="between steps")

    def on_end(self, state: StageState) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(STORE_SECONDS)

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

    def _heartbeat(self, state: StageState) -> dict[str, Any]:
        saved = state.store.progress
        phase = {} if saved is None else {"phase": "saving after step", "saved": saved}
        return self._beat | phase | {"seconds": time.monotonic() - self._beat["since"], "host": os.uname().nodename}

    def _watch(self, state: StageState, heartbeats: Heartbeats) -> None:
        interval = min(BEAT_SECONDS, 60 * state.recipe.resilience.watchdog_minutes / 4)
        while not self._done.wait(interval):
            beat = self._heartbeat(state)
            heartbeats.post(beat)
            if state.validated != self._validated:
                self._validated, self._validated_at = state.validated, time.monotonic()
            seconds = min(beat["seconds"], time.monotonic() - max(self._saved_at, self._validated_at))
            if seconds > self.limit(state) and not self._save_goes_on(beat, heartbeats):
                self._give_up(state, heartbeats, seconds)

    def _save_goes_on(self, beat: dict[str, Any], heartbeats: Heartbeats) -> bool:
        """Whether training waits for a save of which any rank has written more since this was asked the last time."""
        beats = heartbeats.read() if "saved" in beat else None
        saved = sum(each.get("saved", 0) for each in beats or [])
        if beats is None or saved == self._saved:
            return False
        self._saved, self._saved_at = saved, time.monotonic()
        return True

    def _give_up(self, state: StageState, heartbeats: Heartbeats, seconds: float) -> None:
        try:
            self._report(state, heartbeats, seconds)
        finally:  # also when the report cannot be printed, for example on a full disk
            os._exit(HANG)

    def _report(self, state: StageState, heartbeats: Heartbeats, seconds: float) -> None:
        pause = min(BEAT_SECONDS, self.limit(state) / 2)
        time.sleep(pause)  # the others post their last heartbeat meanwhile
        beats = heartbeats.read()
        print(
            f"rank {state.world.rank}: {_what(self._heartbeat(state))} of stage {state.stage.name} has taken "
            f"{seconds:.0f} s, the limit is {self.limit(state):.0f} s\n"
            + (describe_lag(beats) if beats is not None else describe_alone(self._heartbeat(state))),
            file=sys.stderr,
        )
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        if state.world.is_main:
            time.sleep(BEAT_SECONDS + pause)  # its process holds the heartbeats, which the others still have to read


def describe_lag(beats: Sequence[dict[str, Any]]) -> str:
    """Which ranks are behind the others, in which phase and with which samples."""
    last = max(b["step"] for b in beats)
    if all("saved" in b for b in beats):
        return "\n".join(["all ranks wait for a save, and none of them writes", *map(_describe, beats)])
    stuck_before = [b for b in beats if b["phase"] == "between steps"]
    behind = [b for b in beats if b["step"] < last] or (stuck_before if len(stuck_before) < len(beats) else [])
    if behind:
        return "\n".join(map(_describe, behind))
    everyone = "\n".join(map(_describe, beats))
    return f"all ranks are in the same step: a collective hangs, or the slowest of them computes\n{everyone}"


def describe_alone(beat: dict[str, Any]) -> str:
    """What a rank says that cannot read the heartbeats of the others."""
    return f"rank 0 does not answer: its process or its host is gone or frozen. This rank:\n{_describe(beat)}"


def _what(beat: dict[str, Any]) -> str:
    return f"the save after step {beat['step']}" if "saved" in beat else f"step {beat['step'] + 1}"


def _describe(beat: dict[str, Any]) -> str:
    if "saved" in beat:
        return f"  lagging: rank {beat['rank']} on {beat['host']}, {_what(beat)}, {beat['saved']:,} bytes so far"
    keys = ", ".join(beat["keys"]) or "no samples yet (waiting for data)"
    return f"  lagging: rank {beat['rank']} on {beat['host']}, {beat['phase']} {beat['step'] + 1}, samples {keys}"
