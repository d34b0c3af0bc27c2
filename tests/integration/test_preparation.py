"""Preparation by a real Ray and a real Slurm: byte for byte what one process writes, also after lost workers."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.importers.records import open_dataset
from data_pipeline.preparation import index, write
from data_pipeline.preparation.engines import Local, Ray, run
from data_pipeline.shards.sources import open_source
from tests.cluster.slurm import SlurmCluster
from tests.data_pipeline.published import parquet, struct
from tests.fixtures.command import Command
from tests.jobs import ROOT
from tests.waiting import until

pytestmark = pytest.mark.cluster


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """40 rows in four files."""
    for part in range(4):
        rows = [
            {"images": [struct(20 + i)], "texts": [{"user": f"What is {i}?", "assistant": f"number {i}"}]}
            for i in range(10 * part, 10 * part + 10)
        ]
        parquet(tmp_path / "in" / f"train-{part}.parquet", rows, group=5)
    return tmp_path / "in"


@pytest.fixture
def written(source: Path, tmp_path: Path) -> dict[str, bytes]:
    """What one process writes."""
    write.write_dataset(open_dataset(source), tmp_path / "one" / "mine", samples_per_shard=5, engine=Local(1))
    return contents(tmp_path / "one" / "mine")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def die_once(folder: Path, task: int) -> int:
    """Task 3 takes its worker with it, the first time."""
    if task == 3 and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task


def fail(task: int) -> int:
    if task == 2:
        raise DataError("two is damaged")
    return task


def test_ray_writes_the_same_bytes(
    source: Path, written: dict[str, bytes], tmp_path: Path, encoder: Any, command: Command
) -> None:
    import ray  # `make test-cluster` installs it

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        out = tmp_path / "ray" / "mine"
        said = command("data", "write", out, "--from", source, "--samples-per-shard", "5", "--ray")
        assert "40 samples in 8 shards" in said
        assert contents(out) == written
        assert sorted(run(partial(die_once, tmp_path), range(8), Ray(), title="die")) == [i * i for i in range(8)]
        with pytest.raises(DataError, match=r"two is damaged \(1 of 4 tasks failed"):
            run(fail, range(4), Ray(), title="fail")
        job = index.open_job(out, [index.Measuring(encoder)])
        assert index.index_missing(job, engine=Ray()) == 8
        index.finish(job, num_processes=1)
        assert open_source("s", out, encoder).measures[:, 1].sum() == 40
    finally:
        ray.shutdown()


def test_an_array_of_slurm_jobs_and_the_one_that_finishes(
    source: Path, written: dict[str, bytes], tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, SlurmCluster(Path(folder), nodes=2) as cluster:
        out = tmp_path / "slurm" / "mine"
        variables = f"--export=ALL,ALIGNVLM_PYTHON={sys.executable}"
        options = ["--parsable", "--cpus-per-task=1", variables, f"--output={tmp_path}/log-%A-%a.txt"]
        words = [
            str(ROOT / "launch" / "slurm" / "prepare.sbatch"),
            *("write", str(out), "--from", str(source), "--samples-per-shard", "5"),
        ]
        array = cluster.run("sbatch", "--array=0-7", *options, *words)
        last = cluster.run("sbatch", f"--dependency=afterok:{array}", *options, *words)

        def say() -> str:
            return "".join(f"--- {log.name}\n{log.read_text()[-1000:]}\n" for log in tmp_path.glob("log-*"))

        until(lambda: cluster.job(last)["JobState"] == "COMPLETED", "the folder is finished", 240, say)
        assert contents(out) == written
