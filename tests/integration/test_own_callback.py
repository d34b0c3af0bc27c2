"""`alignvlm.train` in a user's program: the example with a callback of its own, and several runs in one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.jobs import ROOT, TINY, copy_store, job_environment, metrics


def run_program(folder: Path, *arguments: str) -> str:
    """A Python program in `folder`; its output."""
    copy_store(folder / "runs")
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder, env=job_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def test_the_example_runs_and_its_state_is_in_the_checkpoint(tmp_path: Path) -> None:
    recipe = tmp_path / "own.yaml"
    shorter = "stages: {instruct: null}\nevaluation: {tasks: {test: null}}\n"
    recipe.write_text(f"extends: {TINY}\nname: own\n{shorter}")
    output = run_program(tmp_path, str(ROOT / "examples" / "own_callback.py"), str(recipe))
    assert "train.processes: 2 has no effect here" in output
    run = tmp_path / "runs" / "own"
    records = metrics(run)
    assert [record["step"] for record in records] == list(range(1, 9))
    totals = {name: sum(record[name] for record in records) for name in ("supervised", "tokens")}
    assert records[-1]["supervised_fraction"] == totals["supervised"] / totals["tokens"]
    state = json.loads((run / "1-connector" / "checkpoints" / "step-00000008" / "state.json").read_text())
    assert state["callbacks"]["SupervisedFraction"] == totals


TWO_RUNS = """
import sys
import alignvlm

short = ["stages.connector.max_steps=1", "stages.instruct=null", "evaluation.tasks.test=null", "train.processes=1"]
for name in ("first", "second"):
    print(name, alignvlm.train(alignvlm.load_recipe(sys.argv[1], [f"name={name}", *short])))
"""


def test_one_process_trains_one_run_after_the_other(tmp_path: Path) -> None:
    lines = run_program(tmp_path, "-c", TWO_RUNS, str(TINY)).splitlines()
    assert {"first 0", "second 0"} <= set(lines)
    first, second = (metrics(tmp_path / "runs" / name) for name in ("first", "second"))
    assert len(first) == 1
    assert first[0]["loss"] == second[0]["loss"]
