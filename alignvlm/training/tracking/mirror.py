"""MLflow as a mirror of the run folder: one parent run, one child per stage, brought up to date from files on disk.

Delivery may fail at any moment (`tracker.py` tries again). `runs/<name>/mlflow.json` remembers the run ids and how far
each stage was delivered, so nothing is sent twice.
"""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

import yaml

from alignvlm.run_folder import EvaluationFolder, Run
from data_pipeline.files import read_json_lines, read_new_lines, write_atomic

BATCH = 900
"""Metrics per request: MLflow takes at most 1,000."""
NOT_METRICS = ("stage", "step", "epoch", "time")


class Mirror:
    """Brings MLflow to the state of one run folder. Every method may be called again after a failure."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.state_file = run.folder.mlflow_state
        self.uri = tracking_uri(run)
        self.state: dict[str, Any] = {
            "uri": self.uri,
            "key": uuid.uuid4().hex,
            "stages": {},
            "delivered": {},
            "sent": [],
        }
        if self.state_file.exists():
            self.state |= json.loads(self.state_file.read_text())
        self._client: Any = None
        self._read = (0, 0)
        self._unsent: dict[str, list[dict[str, Any]]] = {}

    @property
    def client(self) -> Any:
        if self._client is None:
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
            self._client = quiet_mlflow().MlflowClient(self.uri)
        return self._client

    def sync(self) -> None:
        """Deliver everything that the folder holds and MLflow does not."""
        parent = self._ensure_parent()
        self._tag_attempts(parent)
        by_stage = self._new_records()
        folders = self.run.stage_folders()
        for folder in folders:
            name = folder.name
            if name in by_stage or folder.evaluation.results.exists():
                child = self._ensure_stage(name, parent)
                self._send_metrics(name, child, by_stage.get(name, []))
                self._send_evaluation(name, child, folder.evaluation)
                if folder.has_export:
                    self._finish(child, f"finished {name}")
        report = self.run.folder.report_page
        if report.exists() and folders[-1].has_export:
            self._once(f"report {report.stat().st_mtime_ns}", lambda: self._send_report(parent, report))
            self._finish(parent, "finished")

    def _tag_attempts(self, parent: str) -> None:
        """One tag per start of a stage: world size, host, where it resumed."""
        if self.run.folder.attempts.exists():
            for number, attempt in enumerate(read_json_lines(self.run.folder.attempts), 1):
                tag, text = f"attempt.{number:03d}", json.dumps(attempt)
                self._once(tag, lambda tag=tag, text=text: self.client.set_tag(parent, tag, text))

    def _ensure_parent(self) -> str:
        if "parent" not in self.state:
            experiment = self._experiment()
            tags = {"mlflow.runName": self.run.recipe.name, "alignvlm.run": self.state["key"]}
            tags |= json.loads(os.environ.get("MLFLOW_TAGS", "{}"))
            self._remember()
            self.state["parent"] = os.environ.get("MLFLOW_RUN_ID") or self._find_or_create(experiment, tags)
            self._remember()
        self._once("params", self._send_params)
        return self.state["parent"]

    def _ensure_stage(self, name: str, parent: str) -> str:
        if name not in self.state["stages"]:
            experiment = self.client.get_run(parent).info.experiment_id
            tags = {
                "mlflow.runName": f"{self.run.recipe.name}/{name}",
                "mlflow.parentRunId": parent,
                "alignvlm.run": f"{self.state['key']}/{name}",
            }
            self.state["stages"][name] = self._find_or_create(experiment, tags)
            self._remember()
        return self.state["stages"][name]

    def _experiment(self) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self.run.recipe.tracking.experiment or self.run.recipe.name
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        local = self.uri.startswith("sqlite:")
        artifacts = (Path(self.run.recipe.runs) / "mlartifacts").resolve().as_uri() if local else None
        return self.client.create_experiment(name, artifact_location=artifacts)

    def _find_or_create(self, experiment: str, tags: dict[str, str]) -> str:
        """By its idempotency tag: a start that died between creating and remembering finds its run again."""
        query = f"tags.`alignvlm.run` = '{tags['alignvlm.run']}'"
        found = self.client.search_runs([experiment], query, max_results=1)
        run = found[0] if found else self.client.create_run(experiment, tags=tags)
        return run.info.run_id

    def _send_params(self) -> None:
        """The resolved recipe as parameters (written once) and as a file."""
        from mlflow.entities import Param

        config = self.run.folder.config
        flat = flatten(yaml.safe_load(config.read_text()))
        params = [Param(key, str(value)[:6000]) for key, value in sorted(flat.items())]
        for i in range(0, len(params), 100):
            self.client.log_batch(self.state["parent"], params=params[i : i + 100])
        for file in (config, self.run.folder.environment):
            self.client.log_artifact(self.state["parent"], str(file))

    def _new_records(self) -> dict[str, list[dict[str, Any]]]:
        """Lines of metrics.jsonl that were not read yet, by stage; the file is read anew when it was rewritten."""
        path = self.run.folder.metrics
        if not path.exists():
            return self._unsent
        with path.open("rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            if inode != self._read[0]:
                self._read, self._unsent = (inode, 0), {}
            records, end = read_new_lines(file, self._read[1])
            self._read = (inode, end)
            for record in records:
                self._unsent.setdefault(record["stage"], []).append(record)
        return self._unsent

    def _send_metrics(self, name: str, child: str, records: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        if name not in self.state["delivered"]:
            history = self.client.get_metric_history(child, "loss")
            self.state["delivered"][name] = max((m.step for m in history), default=0)
        fresh = [r for r in records if r["step"] > self.state["delivered"][name]]
        batch: list[Metric] = []
        for i, record in enumerate(fresh):
            values = flatten({k: v for k, v in record.items() if k not in NOT_METRICS})
            stamp = int(record.get("time", time.time()) * 1000)
            batch += [Metric(k, float(v), stamp, record["step"]) for k, v in values.items() if v is not None]
            if len(batch) + 40 > BATCH or i + 1 == len(fresh):
                self.client.log_batch(child, metrics=batch)
                batch = []
                self.state["delivered"][name] = record["step"]
                self._remember()
        self._unsent.pop(name, None)

    def _send_evaluation(self, name: str, child: str, folder: EvaluationFolder) -> None:
        results = folder.results
        if not results.exists():
            return

        step = self.state["delivered"].get(name, 0)

        def send() -> None:
            for task, scores in json.loads(results.read_text())["tasks"].items():
                for key, value in scores.items():
                    if isinstance(value, int | float):
                        self.client.log_metric(child, f"eval/{task}/{key}", float(value), step=step)
                self.client.log_artifact(child, str(folder.predictions(task)), "predictions")

        self._once(f"evaluation {name} {results.stat().st_mtime_ns}", send)

    def _send_report(self, parent: str, report: Path) -> None:
        for file in (report, self.run.folder.report_results):
            self.client.log_artifact(parent, str(file), "report")

    def _finish(self, run_id: str, mark: str) -> None:
        self._once(mark, lambda: self.client.set_terminated(run_id))

    def _once(self, mark: str, action: Any) -> None:
        if mark not in self.state["sent"]:
            action()
            self.state["sent"].append(mark)
            self._remember()

    def _remember(self) -> None:
        write_atomic(self.state_file, json.dumps(self.state, indent=1) + "\n")


def quiet_mlflow() -> Any:
    """The module; how it sets up a database or finds no GPU is no news of the training."""
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return mlflow


def tracking_uri(run: Run) -> str:
    """`MLFLOW_TRACKING_URI`, else the recipe's, else a SQLite file beside the runs."""
    default = f"sqlite:///{(Path(run.recipe.runs) / 'mlflow.db').resolve()}"
    return os.environ.get("MLFLOW_TRACKING_URI") or run.recipe.tracking.uri or default


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lr": {"vision": 1}} to {"lr/vision": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
