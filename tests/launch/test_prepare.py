"""launch/slurm/prepare.sbatch with Slurm's variables: the jobs of an array share the work, and one more finishes it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from data_pipeline.shards.reader import SourceReader
from tests.data_pipeline.published import parquet, rows_of
from tests.jobs import ROOT, job_environment

SCRIPT = ROOT / "launch" / "slurm" / "prepare.sbatch"


def prepare(cwd: Path, words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = job_environment() | {"ALIGNVLM_PYTHON": sys.executable, "SLURM_CPUS_PER_TASK": "1"} | variables
    return subprocess.run(
        ["bash", str(SCRIPT), *words.split()], cwd=cwd, env=environment, text=True, capture_output=True, timeout=120
    )


def test_jobs_of_an_array_share_the_work(tmp_path: Path) -> None:
    parquet(tmp_path / "in" / "train.parquet", rows_of("finevision"), group=1)
    words = "write out --from in --samples-per-shard 1"
    for number in (3, 5):
        array = {"ID": number, "MIN": 3, "STEP": 2, "COUNT": 2}
        done = prepare(tmp_path, words, **{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()})
        assert done.returncode == 0, done.stderr
        assert f"task {(number - 3) // 2} of 2 wrote 1 shards" in done.stdout
        if number == 3:
            early = prepare(tmp_path, words)
            assert early.returncode == 2
            assert "1 of 2 shards are missing" in early.stderr
    assert prepare(tmp_path, words).returncode == 0
    assert len(SourceReader(tmp_path / "out")) == 2
