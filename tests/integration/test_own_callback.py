"""`alignvlm.train` in a user's program: the example with a callback of its own, and several runs in one process."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.fixtures.command import Command
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
import shutil
import sys
import alignvlm

short = ["stages.connector.max_steps=1", "stages.instruct=null", "evaluation.tasks.test=null", "train.processes=1"]
for name in ("first", "second"):
    print(name, alignvlm.train(alignvlm.load_recipe(sys.argv[1], [f"name={name}", *short])))

early = [
    "name=early", "evaluation.tasks.test=null", "train.processes=1", "stages.instruct.max_steps=1",
    "evaluation.loss={sources: [test], every_steps: 1, max_packs: 1}", "checkpoint.keep_last=1",
    "checkpoint.every_steps=50", "checkpoint.keep_best=loss/held_out", "checkpoint.patience=2",
    "checkpoint.min_delta=1000",
]
for attempt in ("early", "early again"):
    print(attempt, alignvlm.train(alignvlm.load_recipe(sys.argv[1], early)))
    shutil.rmtree("runs/early/1-connector/export")  # as if it had been killed before the export
"""


def test_one_process_trains_one_run_after_the_other(tmp_path: Path, command: Command) -> None:
    """The third one ends a stage early, and keeps the best checkpoint."""
    lines = run_program(tmp_path, "-c", TWO_RUNS, str(TINY)).splitlines()
    assert {"first 0", "second 0"} <= set(lines)
    first, second = (metrics(tmp_path / "runs" / name) for name in ("first", "second"))
    assert len(first) == 1
    assert first[0]["loss"] == second[0]["loss"]

    reason = "loss/held_out has not improved on .* by more than 1000 in 2 validations"
    ends = [line for line in lines if re.fullmatch(f"stage connector ends early, at step 3 of 8: {reason}", line)]
    assert len(ends) == 2  # the second start takes no step, and exports
    assert {"early 0", "early again 0"} <= set(lines)
    folder = tmp_path / "runs" / "early"
    records = metrics(folder)
    assert [(record["stage"], record["step"]) for record in records] == [
        ("connector", 1), ("connector", 2), ("connector", 3), ("instruct", 1),
    ]  # fmt: skip
    assert [record.get("validations_without_improvement") for record in records] == [0, 1, 2, 0]
    assert [record["lr"] for record in records[:2]] == [
        {"vision": 5e-4, "connector": 1e-3, "language": 2.5e-4},
        {"vision": 1e-3, "connector": 2e-3, "language": 5e-4},
    ]
    attempts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    ended = [(attempt["stage"], attempt["resumed_at"]) for attempt in attempts if "ended_early" in attempt]
    assert ended == [("connector", 0), ("connector", 3)]
    best = min(records, key=lambda record: record["loss/held_out"])
    output = command("export", folder, tmp_path / "best", "--best")
    assert re.search(rf"^best: .*-{best['stage']}/checkpoints/step-0*{best['step']} ", output, re.MULTILINE)
