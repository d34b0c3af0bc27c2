"""TensorBoard as a mirror of the run folder: one event file per stage, `runs/<name>/tensorboard/<n>-<stage>`.

A start writes the files anew from metrics.jsonl and goes on from there: nothing is twice in them and nothing is
missing, whatever killed the last start. The bytes of what stays the same are the same, so a TensorBoard that is open
reads on.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.run_folder import StageFolder
from alignvlm.training.tracking.client import TimeLimit
from alignvlm.training.tracking.entries import metrics_of
from alignvlm.training.tracking.records import Records
from alignvlm.training.tracking.scores import mark, scores_of
from alignvlm.training.tracking.target import Target

FILE = "events.out.tfevents.alignvlm"
"""TensorBoard reads the files with `tfevents` in their names."""


class TensorBoard:
    """Writes what `tensorboard --logdir runs` shows; every stage is a run there."""

    def __init__(self, target: Target, limit: TimeLimit) -> None:
        self.notes: list[str] = []
        self._target = target
        self._records = Records(target.folder.metrics)
        self._stages: dict[str, EventFile] = {}
        self._sent: set[str] = set()

    @property
    def place(self) -> str:
        return f"tensorboard --logdir {self._target.folder.tensorboard}"

    def sync(self) -> None:
        """Write new steps and new scores."""
        self._records.read()
        for folder in self._target.stage_folders():
            scores = [(file, values) for file, values in scores_of(folder) if mark(file) not in self._sent]
            records = self._records.take(folder.name)
            if not records and not scores:
                continue
            if folder.name not in self._stages:
                self._stages[folder.name] = EventFile(self._path(folder))
            events = self._stages[folder.name]
            for record in records.values():
                events.write_step(record)
            for file, values in scores:
                events.write(values, max(events.step, 0), file.stat().st_mtime)
                self._sent.add(mark(file))
            events.publish()

    def close(self) -> None:
        for events in self._stages.values():
            events.close()

    def _path(self, folder: StageFolder) -> Path:
        return self._target.folder.tensorboard / folder.path.name / FILE


class EventFile:
    """TensorBoard's events of one stage; the file gets its name with the first `publish`, in place of an older one."""

    def __init__(self, path: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ModuleNotFoundError as error:
            raise UserError("TensorBoard is not installed here: pip install tensorboard") from error
        self.step = -1
        """The last step that was written."""
        self._path, self._new, self._event = path, path.with_name(".new"), Event
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._new.open("wb")
        self._writer = RecordWriter(self._file)
        self._writer.write(Event(wall_time=0.0, file_version="brain.Event:2").SerializeToString())

    def write_step(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl; one that was written already is left."""
        metrics = list(metrics_of(record))
        if record["step"] > self.step and metrics:
            self.step = record["step"]
            self.write({key: value for key, value, _ in metrics}, self.step, metrics[0][2] / 1000)

    def write(self, values: dict[str, float], step: int, seconds: float) -> None:
        """Numbers of one step, at seconds since 1970."""
        event = self._event(wall_time=seconds, step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._writer.write(event.SerializeToString())

    def publish(self) -> None:
        """Everything written so far is there for readers."""
        self._file.flush()
        if self._new is not self._path:
            os.replace(self._new, self._path)
            self._new = self._path

    def close(self) -> None:
        self._file.close()
