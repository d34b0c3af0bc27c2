"""Watching a run's folder while something else runs the job, and starting a run in its middle."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from data_pipeline.files import read_json_lines
from tests.jobs import ROOT, metrics

RECIPE = ROOT / "tests" / "recipes" / "cluster.yaml"
STAGE = "1-connector"


def step(folder: Path) -> int:
    """The newest step of the run in `folder`/runs/cluster, 0 before the first."""
    records = metrics(folder / "runs" / "cluster")
    return records[-1]["step"] if records else 0


def attempts(folder: Path) -> list[dict[str, Any]]:
    """How often the stage was started, from which step, with how many processes."""
    path = folder / "runs" / "cluster" / "attempts.jsonl"
    return read_json_lines(path) if path.exists() else []


def copy_until(reference: Path, folder: Path, at: int) -> None:
    """Make `folder` what `reference` was when it had saved step `at` of its only stage; MLflow starts anew."""
    shutil.copytree(reference / "data", folder / "data")
    run = folder / "runs" / "cluster"
    shutil.copytree(reference / "runs" / "cluster", run)
    for name in ("mlflow.json", "attempts.jsonl"):
        (run / name).unlink()
    for name in ("report", f"{STAGE}/export"):
        shutil.rmtree(run / name)
    for checkpoint in (run / STAGE / "checkpoints").iterdir():
        if checkpoint.name != f"step-{at:08d}":
            shutil.rmtree(checkpoint)
