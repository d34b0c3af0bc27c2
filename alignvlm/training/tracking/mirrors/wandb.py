"""Weights & Biases as a mirror of the run folder: one run with all stages, which stays the same across resumes.

wandb's own environment variables say where and how (`WANDB_MODE=offline`, `WANDB_API_KEY`, `WANDB_ENTITY`). Online the
server says which steps it has; offline every start writes a folder with all steps, in place of older ones, for
`wandb sync`.
"""

from __future__ import annotations

import os
import shutil
import uuid
from typing import Any

from alignvlm.errors import UserError
from alignvlm.training.tracking.client import TimeLimit
from alignvlm.training.tracking.entries import metrics_of
from alignvlm.training.tracking.records import Records
from alignvlm.training.tracking.scores import mark, scores_of
from alignvlm.training.tracking.target import Target
from data_pipeline.files import read_json, write_atomic

FINISH_SECONDS = 45.0
"""Time for what is not uploaded yet when a start ends; wandb keeps the rest in its folder."""


class WeightsAndBiases:
    """Logs every line of metrics.jsonl as `<stage>/<name>`; its step counts through all stages."""

    def __init__(self, target: Target, limit: TimeLimit) -> None:
        self.notes: list[str] = []
        self._target, self._limit = target, limit
        self._records = Records(target.folder.metrics)
        self._run: Any = None
        self._last: dict[str, int] = {}
        self._sent: set[str] = set()

    @property
    def place(self) -> str:
        return f"wandb sync {self._folder()}" if self._run.offline else self._run.url  # which warns offline

    def sync(self) -> None:
        """Log new steps and new scores."""
        if self._run is None:
            with self._limit(extra=FINISH_SECONDS):
                self._run = self._start()
        self._records.read()
        before = 0
        for folder in self._target.stage_folders():
            for step, record in self._records.take(folder.name).items():
                if step <= self._last.get(folder.name, 0):
                    continue
                self._last[folder.name] = step
                if before + step >= self._run.starting_step:
                    values = {f"{folder.name}/{key}": value for key, value, _ in metrics_of(record)}
                    self._run.log(values | {f"{folder.name}/step": step}, step=before + step, commit=True)
            for file, scores in scores_of(folder):
                if mark(file) not in self._sent:
                    self._run.summary.update({f"{folder.name}/{key}": value for key, value in scores.items()})
                    self._sent.add(mark(file))
            before += self._last.get(folder.name, 0)

    def close(self) -> None:
        """Wait for the upload; offline, remove what earlier starts left, which this one's folder contains."""
        self._run.finish()
        if self._run.offline:
            for folder in self._target.folder.wandb.glob(f"offline-run-*-{self._run.id}"):
                if folder != self._folder():
                    shutil.rmtree(folder, ignore_errors=True)

    def _start(self) -> Any:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise UserError("wandb is not installed here: pip install wandb") from error
        settings = wandb.Settings(
            silent=True, console="off", disable_code=True, disable_git=True, x_save_requirements=False,
            finish_timeout=FINISH_SECONDS, finish_timeout_raises=True,
        )  # fmt: skip
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or self._target.experiment, name=self._target.name, id=self._id(),
            dir=str(self._target.folder.path), config=self._target.read_config(), resume="allow",
            reinit="finish_previous", settings=settings,
        )  # fmt: skip
        for _, name in self._target.stages:
            run.define_metric(f"{name}/*", step_metric=f"{name}/step")
        return run

    def _id(self) -> str:
        """The run's id, made once."""
        state = self._target.folder.wandb_state
        found = read_json(state, {"id": str}).get("id")
        if not found:
            found = uuid.uuid4().hex[:12]
            write_atomic(state, f'{{"id": "{found}"}}\n')
        return found

    def _folder(self) -> Any:
        return self._target.folder.wandb / os.path.basename(os.path.dirname(self._run.dir))
