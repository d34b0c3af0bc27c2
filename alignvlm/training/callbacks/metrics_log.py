"""`metrics.jsonl` (a line per optimizer step) and `attempts.jsonl` (a line per start of a stage), written by rank 0.

Lines of steps that are taken again after a restart move to `lost_steps.jsonl`. Report and tracking read them; nothing
else remembers what happened.
"""

from __future__ import annotations

import logging
import socket
import time
from pathlib import Path
from typing import Any

from alignvlm.run_folder import ATTEMPTS_LINE, METRICS_LINE
from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord
from data_pipeline.files import JsonLinesLog, read_json_lines, read_new_lines, reason, write_json_lines
from data_pipeline.stores import hub

log = logging.getLogger(__name__)


class MetricsLog(Callback):
    """Appends each step's record; a resumed stage first moves the lines of steps it is going to take again.

    Lines wait in memory while the disk is full.
    """

    def __init__(self) -> None:
        self._log: JsonLinesLog | None = None

    def on_start(self, state: StageState) -> None:
        if state.world.is_main:
            keep_until(state.run.folder.metrics, state.run.folder.lost_steps, state.stage.name, state.step)
            attempt = {
                "stage": state.stage.name,
                "resumed_at": state.step,
                "world_size": state.world.size,
                "time": time.time(),
                "host": socket.gethostname(),
            } | ({"hub": commits} if (commits := hub.held_commits()) else {})
            attempts = JsonLinesLog(state.run.folder.attempts)
            attempts.append(attempt)
            attempts.close()
            self._log = JsonLinesLog(state.run.folder.metrics)

    def on_step(self, state: StageState, record: StepRecord) -> None:
        if self._log is not None:
            self._log.append(record.to_json())

    def on_end(self, state: StageState) -> None:
        if self._log is not None:
            self._log.close()
            if state.ended_early is not None:
                note_early_end(state.run.folder.attempts, state.step, state.ended_early)


def note_early_end(path: Path, step: int, why: str) -> None:
    """Say in the line of the current attempt that it ended its stage early. A disk that refuses is a warning."""
    try:
        *rows, last = read_json_lines(path, ATTEMPTS_LINE)
        write_json_lines(path, [*rows, last | {"ended_early": f"step {step}: {why}"}])
    except (OSError, ValueError) as error:
        log.warning("%s does not say that the stage ended early at step %d (%s)", path, step, reason(error))


def keep_until(metrics: Path, lost_steps: Path, stage: str, step: int) -> None:
    """Move the stage's lines after `step` to `lost_steps`; damaged lines, and one that a crash cut short, go.

    They are in the other file before they leave this one. Who is killed between the two leaves them in both, and the
    next start adds no line a second time. A disk that does not allow it is a warning: of two lines of a step, readers
    take the last one.
    """
    if not metrics.exists():
        return
    try:
        rows = _lines(metrics)
        lost = [row for row in rows if row["stage"] == stage and row["step"] > step]
        if lost:
            moved = _lines(lost_steps) if lost_steps.exists() else []
            write_json_lines(lost_steps, moved + [row for row in lost if row not in moved])
        write_json_lines(metrics, [row for row in rows if row["stage"] != stage or row["step"] <= step])
    except OSError as error:
        log.warning("%s cannot be cut to step %d of stage %s (%s)", metrics, step, stage, reason(error))


def _lines(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as file:
        return read_new_lines(file, shape=METRICS_LINE)[0]
