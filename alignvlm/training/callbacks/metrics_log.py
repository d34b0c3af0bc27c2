"""`metrics.jsonl` (a line per optimizer step) and `attempts.jsonl` (a line per start of a stage), written by rank 0.

Report and tracking read them; nothing else remembers what happened.
"""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import IO

from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord
from data_pipeline.files import read_json_lines, write_json_lines


class MetricsLog(Callback):
    """Appends each step's record; a resumed stage first drops the lines of steps it is going to take again."""

    def __init__(self) -> None:
        self._file: IO[str] | None = None

    def on_start(self, state: StageState) -> None:
        if state.world.is_main:
            keep_until(state.run.folder.metrics, state.stage.name, state.step)
            attempt = {
                "stage": state.stage.name,
                "resumed_at": state.step,
                "world_size": state.world.size,
                "time": time.time(),
            }
            with state.run.folder.attempts.open("a") as file:
                file.write(json.dumps(attempt | {"host": socket.gethostname()}) + "\n")
            self._file = state.run.folder.metrics.open("a")

    def on_step(self, state: StageState, record: StepRecord) -> None:
        if self._file is not None:
            self._file.write(json.dumps(record.to_json()) + "\n")
            self._file.flush()

    def on_end(self, state: StageState) -> None:
        if self._file is not None:
            self._file.close()


def keep_until(path: Path, stage: str, step: int) -> None:
    """Remove the stage's lines after `step`, and a last line that a crash cut short."""
    if not path.exists():
        return
    write_json_lines(path, [row for row in read_json_lines(path) if row["stage"] != stage or row["step"] <= step])
