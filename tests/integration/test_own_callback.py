"""examples/own_callback.py as a user runs it: one process, a record with its number, a checkpoint with its state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.jobs import ROOT, TINY, copy_store, job_environment, metrics


def test_the_example_runs_and_its_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    shorter = "stages: {instruct: null}\nevaluation: {tasks: {test: null}}\n"
    recipe.write_text(f"extends: {TINY}\nname: own\n{shorter}")
    copy_store(tmp_path / "runs")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "own_callback.py"), str(recipe)],
        cwd=tmp_path, env=job_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert "train.processes: 2 has no effect here" in done.stdout
    run = tmp_path / "runs" / "own"
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, 9))
    totals = {name: sum(record[name] for record in records) for name in ("supervised", "tokens")}
    assert records[-1]["supervised_fraction"] == totals["supervised"] / totals["tokens"]
    state = json.loads((run / "1-connector" / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["callbacks"]["SupervisedFraction"] == totals
