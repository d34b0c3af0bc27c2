"""A real Slurm: a job on two nodes, submitted once, ends with the trained model, whatever the scheduler does to it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from alignvlm.config import load_recipe
from alignvlm.launch.slurm import SlurmArray, SlurmJob
from tests.cluster.goodput import kept_of_failures
from tests.cluster.slurm import SlurmCluster
from tests.cluster.watch import RECIPE, STAGE, attempts, step
from tests.jobs import ROOT, curve, metrics, run, weights
from tests.waiting import until

pytestmark = pytest.mark.cluster

OPTIONS = ["--nodes=2", "--gpus-per-node=0", "--processes-per-node=1", "--time=60", "--signal-seconds=90"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture
def cluster() -> Iterator[SlurmCluster]:
    """Three nodes, so that there are still two when one is lost; a short path, because the folder holds sockets."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, SlurmCluster(Path(folder), nodes=3) as cluster:
        yield cluster


def test_time_limit_requeue_and_a_lost_node_leave_no_trace(
    uninterrupted: Path, cluster: SlurmCluster, tmp_path: Path
) -> None:
    output = run("launch", "slurm", str(RECIPE), *OPTIONS, cwd=tmp_path, **cluster.environment)
    number = re.search(r"submitted job (\d+)", output)[1]
    logs = tmp_path / "runs" / "cluster" / "logs"

    def say() -> str:
        files = [*sorted(logs.glob("*")), *cluster.folder.glob("*.log")]
        return "".join(f"--- {file.name}\n{file.read_text()[-3000:]}\n" for file in files)

    def trains(attempt: int, at: int) -> None:
        until(lambda: len(attempts(tmp_path)) == attempt and step(tmp_path) >= at, f"attempt {attempt}", 180, say)

    trains(1, at=5)
    cluster.run("scontrol", "requeue", number)
    cluster.start_now(number)

    trains(2, at=attempts_next(tmp_path))
    cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    cluster.start_now(number)

    trains(3, at=attempts_next(tmp_path))
    cluster.limit_time(number, minutes=2)
    cluster.start_now(number, timeout=90)
    cluster.run("scontrol", "update", f"JobId={number}", "TimeLimit=60")

    until(lambda: cluster.job(number)["JobState"] in ENDED, "the job ends", 240, say)
    job = cluster.job(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "3"), say()

    ours, theirs = tmp_path / "runs" / "cluster", uninterrupted / "runs" / "cluster"
    assert curve(ours) == curve(theirs)
    exports = [weights(folder / STAGE / "export") for folder in (ours, theirs)]
    assert exports[0].keys() == exports[1].keys()
    assert all(torch.equal(exports[0][name], exports[1][name]) for name in exports[0])

    assert kept_of_failures(ours, with_waiting=False) >= 0.90

    stopped = re.findall(r"stopped in stage connector: signal (\w+)", (logs / "rank-0.log").read_text())
    assert len(stopped) == 3, say()
    assert [a["world_size"] for a in attempts(tmp_path)] == [2, 2, 2, 2]
    assert "signal ahead of the time limit" in (logs / f"slurm-{number}.log").read_text()

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("cluster").experiment_id])
    assert len({r.info.run_name for r in runs}) == len(runs)
    child = next(r for r in runs if r.info.run_name == "cluster/connector")
    losses = sorted(client.get_metric_history(child.info.run_id, "loss"), key=lambda m: m.step)
    assert [(m.step, m.value) for m in losses] == [(r["step"], r["loss"]) for r in metrics(ours)]


def test_mistakes_crashes_and_cancelled_jobs_do_not_come_back(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Three jobs with a stand-in for the program: what must not go round in circles, does not."""

    def submit(name: str, program: str) -> str:
        python = tmp_path / name
        python.write_text(f"#!/bin/bash\necho start >>{python}.starts\n{program}\n")
        python.chmod(0o755)
        variables = f"ALL,ALIGNVLM_PYTHON={python},ALIGNVLM_LOGS={tmp_path / 'logs'},ALIGNVLM_MAX_CRASHES=1"
        options = ["--parsable", "--nodes=1", "--ntasks-per-node=2", f"--export={variables}", f"--output={python}.log"]
        return cluster.run("sbatch", *options, str(ROOT / "launch" / "slurm" / "train.sbatch"), "recipe")

    saves = "trap 'sleep 1; exit 75' TERM; for i in {1..300}; do sleep 0.1; done"
    mistake, crash, long = submit("mistake", "exit 2"), submit("crash", "exit 9"), submit("long", saves)

    def state(number: str) -> tuple[str, str, str]:
        job = cluster.job(number)
        return job["JobState"], job["ExitCode"], job["Restarts"]

    until(lambda: (tmp_path / "long.starts").exists(), "the job runs", 120)
    cluster.run("scancel", long)
    cluster.start_now(crash)
    until(lambda: state(crash) == ("FAILED", "9:0", "1"), "the crashing job gives up", 60, lambda: str(state(crash)))
    until(lambda: state(mistake) == ("FAILED", "2:0", "0"), "the mistake ends the job", 60, lambda: str(state(mistake)))
    until(lambda: state(long)[::2] == ("CANCELLED", "0"), "the cancelled job ends", 60, lambda: str(state(long)))
    assert (tmp_path / "crash.starts").read_text().count("start") == 4


def attempts_next(folder: Path) -> int:
    """Some steps after where the run stands now."""
    return step(folder) + 5


def test_runs_of_a_study_are_requeued_one_by_one(cluster: SlurmCluster, tmp_path: Path) -> None:
    """With a stand-in for the program: two of three runs save and ask for another start, and no other is disturbed."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\nshift 3\necho "$@" >>"{tmp_path}/$1.starts"\nsleep 3\n'
        f'[[ $1 == once || $(wc -l <"{tmp_path}/$1.starts") -ge 2 ]] || exit 75\n'
    )
    python.chmod(0o755)
    shape = SlurmJob(
        "", (), nodes=1, gpus_per_node=0, processes_per_node=1, cpus_per_process=1, time="10", signal_seconds=90
    )
    recipe = load_recipe(str(RECIPE), [f"runs={tmp_path / 'my runs'}"])
    array = SlurmArray(shape, "study", tmp_path, [(recipe, [name, "a=b c"]) for name in ("first", "once", "last")])
    array.file.write_text(array.lines)
    number = cluster.run("sbatch", f"--export=ALL,ALIGNVLM_PYTHON={python}", *array.command()[1:]).strip()

    def starts() -> dict[str, list[str]]:
        return {path.stem: path.read_text().splitlines() for path in tmp_path.glob("*.starts")}

    def say() -> str:
        return f"{starts()}\n" + "".join(path.read_text()[-2000:] for path in tmp_path.glob("slurm-*.log"))

    until(lambda: set(starts()) == {"first", "once", "last"}, "all runs start", 90, say)
    pending = lambda: cluster.run("squeue", "--noheader", "--states=PENDING", "--format=%i").split()
    until(lambda: len(pending()) == 2, "two are back in the queue", 60, say)
    for task in (0, 2):
        cluster.start_now(f"{number}_{task}")
    until(lambda: not cluster.run("squeue", "--noheader").strip(), "all have ended", 90, say)
    assert starts() == {"first": ["first a=b c"] * 2, "once": ["once a=b c"], "last": ["last a=b c"] * 2}, say()
    assert (tmp_path / "my runs" / "cluster" / "logs" / "rank-0.log").exists()
