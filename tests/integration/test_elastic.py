"""Stops by signal, and another number of ranks after every one of them: the losses go on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults import Jobs
from tests.jobs import TINY, curve, metrics, start, wait_for_step

LONG = ["stages.connector.max_steps=26", "stages.connector.warmup_steps=4", "checkpoint.every_steps=50"]
LONG += ["stages.instruct=null", "evaluation.tasks.test=null"]


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Process ids of the job's ranks: the children that `alignvlm train` started (it is the rank when it needs one)."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(child) for child in children if "RANK=" in Path(f"/proc/{child}/environ").read_text()]
    return ranks or [process.pid]


def stop_at(step: int, folder: Path, processes: int, number: signal.Signals, whole_group: bool = False) -> str:
    """Start the job with so many ranks, hit it with a signal once it passed a step, and wait until it has saved.

    The signal goes to one rank, or to every process of the job, loader processes included, as Slurm sends it.
    """
    process = start("train", str(TINY), *LONG, f"train.processes={processes}", cwd=folder)
    wait_for_step(folder / "runs" / "tiny", "connector", step, process)
    if whole_group:
        os.killpg(process.pid, number)
    else:
        os.kill(ranks_of(process)[-1], number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output[-3000:]
    assert "the same command resumes here" in output
    return output


def test_world_sizes_2_1_4_2_in_one_training(tmp_path: Path, jobs: Jobs) -> None:
    reference = tmp_path / "reference"
    reference.mkdir()
    jobs.at(reference).finish(str(TINY), *LONG)
    folder = tmp_path / "elastic"
    folder.mkdir()
    stop_at(4, folder, 2, signal.SIGUSR1)
    assert "converting from 2 to 1 ranks" in stop_at(8, folder, 1, signal.SIGINT, whole_group=True)
    assert "converting from 1 to 4 ranks" in stop_at(12, folder, 4, signal.SIGHUP, whole_group=True)
    jobs.at(folder).finish(str(TINY), *LONG)
    ours, theirs = curve(folder / "runs" / "tiny"), curve(reference / "runs" / "tiny")
    assert [(stage, step) for stage, step, *_ in ours] == [(stage, step) for stage, step, *_ in theirs]
    for (stage, step, loss, norm), (_, _, expected, expected_norm) in zip(ours, theirs, strict=True):
        assert loss == pytest.approx(expected, abs=1e-5), f"{stage} step {step}"
        assert norm == pytest.approx(expected_norm, rel=1e-3), f"{stage} step {step}"
    samples = [(r["samples"], r["tokens"], r["supervised"]) for r in metrics(folder / "runs" / "tiny")]
    assert samples == [(r["samples"], r["tokens"], r["supervised"]) for r in metrics(reference / "runs" / "tiny")]
