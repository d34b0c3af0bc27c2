"""MLflow as a mirror of the run folder: one parent run, one child per stage, brought up to date from files on disk.

Delivery may fail at any moment (`worker.py` tries again). `runs/<name>/mlflow.json` remembers the run ids and how far
each stage was delivered, so nothing is sent twice.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.report.goodput import goodput_of
from alignvlm.run_folder import METRICS_LINE, StageFolder
from alignvlm.training.tracking.client import Client, TimeLimit
from alignvlm.training.tracking.database import prepare_database, sqlite_file
from alignvlm.training.tracking.entries import MAX_PARAM, MAX_TAG, clean_key, clean_text, flatten, metrics_of
from alignvlm.training.tracking.failures import first_line, is_missing, is_refusal, one_line
from alignvlm.training.tracking.records import Records
from alignvlm.training.tracking.scores import mark, scores_of, tasks_of
from alignvlm.training.tracking.target import Target
from data_pipeline.files import read_json, read_json_lines, to_json, write_atomic

METRICS_PER_REQUEST = 900
"""Metrics per request; MLflow takes at most 1,000."""
PARAMS_PER_REQUEST = 100
"""What MLflow takes at most."""

STATE = {
    "uri": str, "key": str, "parent?": str, "stages": {str: str}, "delivered": {str: int}, "sent": [str],
}  # fmt: skip
"""What mlflow.json holds."""
CREATION_SECONDS = 120.0
"""What the tables of a new database may take, in addition to the limit: seconds on a disk, a minute on a slow one."""


class MLflow:
    """Brings MLflow to the state of one run folder. Every method may be called again after a failure."""

    def __init__(self, target: Target, limit: TimeLimit) -> None:
        self.target, self.folder, self._limit = target, target.folder, limit
        self.notes: list[str] = []
        """Lines about entries that MLflow does not take; who reports them empties the list."""
        self.state = self._remembered()
        self._client: Client | None = None
        self._experiment_id: str | None = None
        self._records = Records(self.folder.metrics)

    @property
    def place(self) -> str:
        """Where the run is found."""
        return f"{self.target.shown_uri}, run {self.state['parent']}"

    @property
    def client(self) -> Client:
        if self._client is None:
            self._client = Client(self.target.uri, self._limit)
        return self._client

    def sync(self) -> None:
        """Deliver everything that the folder holds and MLflow does not. Raises whatever MLflow raises (failures.py)."""
        self.target.check()
        with self._limit(extra=CREATION_SECONDS):
            prepare_database(self.target.uri)
        parent = self._ensure_parent()
        starts = self._send_attempts(parent)
        self._once(f"goodput {starts}", lambda: self._send_goodput(parent, starts))
        self._records.read()
        folders = self.target.stage_folders()
        evaluated = {f.name for f in folders if f.evaluation.results.exists() or f.benchmarks.results.exists()}
        started = [f for f in folders if f.name in self._records.unsent or f.name in evaluated]
        for folder in started:
            child = self._ensure_stage(folder.name, parent)
            self._send_metrics(folder.name, child)
            self._send_scores(folder, child)
            if folder.has_export:
                self._finish(child, f"finished {folder.name}")
        page = self.folder.report_page
        is_finished = page.exists() and folders[-1].has_export
        if is_finished:
            self._once(f"goodput {mark(page)}", lambda: self._send_goodput(parent, starts + 1))
            self._finish(parent, "finished")
        # Files last: a store of artifacts that cannot be reached keeps no number back.
        self._upload(parent, [self.folder.config, self.folder.environment], "recipe")
        for folder in started:
            evaluation, child = folder.evaluation, self.state["stages"][folder.name]
            if evaluation.results.exists():
                files = [evaluation.predictions(task) for task in tasks_of(evaluation)]
                self._upload(child, files, mark(evaluation.results), "predictions")
            if folder.benchmarks.results.exists():
                self._upload(child, [folder.benchmarks.paper], mark(folder.benchmarks.results), "benchmarks")
        if is_finished:
            self._upload(parent, [page, self.folder.report_results], mark(page), "report")

    def close(self) -> None:
        """Nothing is open between two deliveries."""

    def _remembered(self) -> dict[str, Any]:
        """What mlflow.json says when it fits this tracking URI; else only the key, by which runs are found again."""
        state = read_json(self.folder.mlflow_state, STATE)
        if state and self.target.mask(state["uri"]) == self.target.shown_uri:
            return state
        return self._fresh(state.get("key") or uuid.uuid4().hex)

    def _fresh(self, key: str) -> dict[str, Any]:
        return {"uri": self.target.shown_uri, "key": key, "stages": {}, "delivered": {}, "sent": []}

    def _remember(self) -> None:
        write_atomic(self.folder.mlflow_state, to_json(self.state, indent=1) + "\n")

    def _ensure_parent(self) -> str:
        try:
            return self._find_parent()
        except Exception as error:
            if not is_missing(error) or "parent" not in self.state:
                raise
        self.state = self._fresh(self.state["key"])  # the database was lost or made anew: it gets everything again
        self._records.forget()
        return self._find_parent()

    def _find_parent(self) -> str:
        if "parent" not in self.state:
            self._remember()
            tags = {"mlflow.runName": clean_text(self.target.name, MAX_TAG), "alignvlm.run": self.state["key"]}
            self.state["parent"] = os.environ.get("MLFLOW_RUN_ID") or self._find_or_create(self._experiment(), tags)
            self._remember()
        parent = self.state["parent"]
        if self._experiment_id is None:
            self._experiment_id = self.client.get_run(parent).info.experiment_id
        self._once("params", lambda: self._send_params(parent))
        return parent

    def _ensure_stage(self, name: str, parent: str) -> str:
        if name not in self.state["stages"]:
            tags = {
                "mlflow.runName": clean_text(f"{self.target.name}/{name}", MAX_TAG),
                "mlflow.parentRunId": parent,
                "alignvlm.run": clean_key(f"{self.state['key']}/{name}"),
            }
            assert self._experiment_id is not None
            self.state["stages"][name] = self._find_or_create(self._experiment_id, tags)
            self._remember()
        return self.state["stages"][name]

    def _experiment(self) -> str:
        name = clean_text(self.target.experiment)
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        is_local = sqlite_file(self.target.uri) is not None
        artifacts = Path(self.target.artifacts).as_uri() if is_local else None
        return self.client.create_experiment(name, artifact_location=artifacts)

    def _find_or_create(self, experiment: str, tags: dict[str, str]) -> str:
        """The run with this idempotency tag: a start that died between creating and noting a run finds it again."""
        query = f"tags.`alignvlm.run` = '{tags['alignvlm.run']}'"
        found = self.client.search_runs([experiment], query, max_results=1)
        run = found[0] if found else self.client.create_run(experiment, tags=tags)
        if not run.info.run_id:
            raise UserError("it sent a run without an id: is this the address of an MLflow server?")
        return run.info.run_id

    def _send_params(self, parent: str) -> None:
        """The user's tags, and the resolved recipe as parameters (MLflow lets nobody change them later)."""
        from mlflow.entities import Param, RunTag

        try:
            tags = dict(json.loads(os.environ.get("MLFLOW_TAGS") or "{}"))
        except (ValueError, TypeError):
            tags = {}
            self._note("MLFLOW_TAGS", "it is not a JSON object")
        self._log(parent, tags=[RunTag(str(key), clean_text(value, MAX_TAG)) for key, value in tags.items()])
        flat = flatten(self.target.read_config())
        named = {clean_key(key): self.target.mask(clean_text(value)) for key, value in sorted(flat.items())}
        params = [Param(key, value[:MAX_PARAM]) for key, value in named.items()]
        for i in range(0, len(params), PARAMS_PER_REQUEST):
            self._log(parent, params=params[i : i + PARAMS_PER_REQUEST])

    def _send_attempts(self, parent: str) -> int:
        """One tag per start of a stage: world size, host, where it resumed. Returns their number."""
        from mlflow.entities import RunTag

        attempts = read_json_lines(self.folder.attempts)
        for start, attempt in enumerate(attempts, 1):
            tag = RunTag(f"attempt.{start:03d}", clean_text(json.dumps(attempt), MAX_TAG))
            self._once(tag.key, partial(self._log, parent, tags=[tag]))
        return len(attempts)

    def _send_goodput(self, parent: str, starts: int) -> None:
        """ETTR and seconds of every part up to now, as metrics of the run whose step is the number of starts."""
        from mlflow.entities import Metric

        found = goodput_of(self.folder, read_json_lines(self.folder.metrics, METRICS_LINE))
        if found is not None:
            values = {"ettr": found.ettr} | {f"{part}_seconds": seconds for part, seconds in found.parts.items()}
            moment = int(time.time() * 1000)
            self._log(parent, metrics=[Metric(f"goodput/{k}", value, moment, starts) for k, value in values.items()])

    def _send_metrics(self, name: str, child: str) -> None:
        from mlflow.entities import Metric

        if name not in self.state["delivered"]:
            history = self.client.get_metric_history(child, "loss")
            self.state["delivered"][name] = max((m.step for m in history), default=0)
        fresh = [r for r in self._records.unsent.get(name, []) if r["step"] > self.state["delivered"][name]]
        batch: list[Metric] = []
        for i, record in enumerate(fresh):
            batch += [Metric(key, value, moment, record["step"]) for key, value, moment in metrics_of(record)]
            if len(batch) + 40 > METRICS_PER_REQUEST or i + 1 == len(fresh):
                self._log(child, metrics=batch)
                batch = []
                self.state["delivered"][name] = record["step"]
                self._remember()
        self._records.unsent.pop(name, None)

    def _send_scores(self, folder: StageFolder, child: str) -> None:
        from mlflow.entities import Metric

        step = self.state["delivered"].get(folder.name, 0)
        for results, scores in scores_of(folder):
            moment = int(results.stat().st_mtime * 1000)
            metrics = [Metric(clean_key(key), score, moment, step) for key, score in scores.items()]
            self._once(f"scores {mark(results)}", partial(self._log, child, metrics=metrics))

    def _upload(self, run_id: str, files: Sequence[Path], mark: str, into: str | None = None) -> None:
        """Send the files that exist as artifacts, once."""

        def send() -> None:
            for file in files:
                if file.is_file():
                    self.client.upload(run_id, file, into)

        self._once(f"files {mark}", send)

    def _log(self, run_id: str, **entries: list[Any]) -> None:
        """Send metrics, params or tags. Entries that MLflow refuses are left out and noted, unless it refuses all."""
        ((kind, values),) = entries.items()
        refused = self._log_some(run_id, kind, values)
        if refused and len(refused) == len(values):
            raise refused[0][1]
        for name, error in refused:
            self._note(name, error)

    def _log_some(self, run_id: str, kind: str, values: list[Any]) -> list[tuple[str, Exception]]:
        """(name, error) of the entries that are refused: those of a refused request are sent again in two halves."""
        if not values:
            return []
        try:
            self.client.log_batch(run_id, **{kind: values})
        except Exception as error:
            if not is_refusal(error):
                raise
            if len(values) == 1:
                return [(values[0].key, error)]
            middle = len(values) // 2
            return self._log_some(run_id, kind, values[:middle]) + self._log_some(run_id, kind, values[middle:])
        return []

    def _note(self, name: str, reason: object) -> None:
        text = f"MLflow at {self.target.shown_uri} does not take {name!r}: {first_line(reason)}"
        self.notes.append(one_line(self.target, text))

    def _finish(self, run_id: str, mark: str) -> None:
        self._once(mark, lambda: self.client.set_terminated(run_id))

    def _once(self, mark: str, action: Callable[[], None]) -> None:
        if mark not in self.state["sent"]:
            action()
            self.state["sent"].append(mark)
            self._remember()
