"""Starting real training jobs in tests: as a user would, through `alignvlm train`, in a folder of their own."""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from data_pipeline.files import read_json_lines

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tests" / "recipes" / "tiny.yaml"


def job_environment(**extra: str) -> dict[str, str]:
    """The environment of a job: this checkout's code, one thread per process, no GPU, no leftovers of a launcher.

    Jobs keep the bytecode of this checkout, whatever the caller says: compiling it takes each process half a second.
    """
    unwanted = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONDONTWRITEBYTECODE")
    inherited = {k: v for k, v in os.environ.items() if k not in unwanted and not k.startswith("MLFLOW_")}
    return inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra


@functools.cache
def empty_store() -> Path:
    """An MLflow database without runs, made once per session: making its tables takes two seconds each time."""
    from mlflow import MlflowClient

    folder = Path(tempfile.mkdtemp(prefix="alignvlm-mlflow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    MlflowClient(f"sqlite:///{folder / 'mlflow.db'}").search_experiments()
    return folder / "mlflow.db"


def copy_store(runs: Path) -> None:
    """Put the empty database where runs in this folder track themselves, unless there is one."""
    runs.mkdir(parents=True, exist_ok=True)
    if not (runs / "mlflow.db").exists():
        shutil.copy(empty_store(), runs / "mlflow.db")


def start(*arguments: str, cwd: Path, new_store: bool = False, **environment: str) -> subprocess.Popen[str]:
    """`alignvlm <arguments>` in its own process group, output captured; `new_store` lets MLflow make its tables."""
    if arguments[0] == "train" and not new_store:
        copy_store(cwd / "runs")
    return subprocess.Popen(
        [sys.executable, "-m", "alignvlm", *arguments], cwd=cwd, env=job_environment(**environment), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def run(
    *arguments: str, cwd: Path, timeout: float = 240, code: int = 0, new_store: bool = False, **environment: str
) -> str:
    """Run to the end, check the exit code, return the output."""
    process = start(*arguments, cwd=cwd, new_store=new_store, **environment)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        kill(process)
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{output[-4000:]}"
    return output


def kill(process: subprocess.Popen[str]) -> None:
    """`kill -9` of the whole job."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def kill_launcher(process: subprocess.Popen[str]) -> None:
    """`kill -9` of the job's first process only; all others must follow it."""
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while left := [pid for pid, (state, *_) in processes(process.pid) if state != "Z"]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def processes(session: int) -> Iterator[tuple[int, list[str]]]:
    """Process ids of a session (`start` makes one), and the fields of /proc/PID/stat from the state on."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        if int(fields[3]) == session:
            yield int(path.parent.name), fields


def wait_for_step(folder: Path, stage: str, step: int, process: subprocess.Popen[str], timeout: float = 180) -> None:
    """Until `metrics.jsonl` has that step; a job that does not get there is killed."""
    deadline = time.monotonic() + timeout
    while not any(r["stage"] == stage and r["step"] >= step for r in metrics(folder)):
        assert process.poll() is None, f"the job ended early:\n{process.communicate()[0][-4000:]}"
        if time.monotonic() > deadline:
            kill(process)
            raise AssertionError(f"{stage} did not reach step {step} in {timeout} s")
        time.sleep(0.05)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's metrics."""
    path = folder / "metrics.jsonl"
    return read_json_lines(path) if path.exists() else []


def curve(folder: Path) -> list[tuple[str, int, float, float]]:
    """(stage, step, loss, gradient norm) of every line, bits and all."""
    return [(r["stage"], r["step"], r["loss"], r["grad_norm"]) for r in metrics(folder)]


def weights(export: Path) -> dict[str, Any]:
    """All tensors of an export folder."""
    return {name: value for file in sorted(export.glob("*.safetensors")) for name, value in load_file(file).items()}
