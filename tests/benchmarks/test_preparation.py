"""`benchmarks/preparation/run.py` on a few images: every way to prepare them is timed and written with its ratio."""

import json
import subprocess
import sys
from pathlib import Path

from tests.checkout import ROOT
from tests.jobs import job_environment


def test_it_writes_what_it_measured(tmp_path: Path) -> None:
    options = ["--pages", "2", "--crops", "6", "--repeats", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "preparation" / "run.py"), *options]
    environment = job_environment(BENCHMARK_RESULTS=str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr[-3000:]  # 1: an aim is missed
    results = json.loads((tmp_path / "preparation.json").read_text())["results"]
    for size, samples in (("page", 2), ("crop", 6)):
        result = results[size]
        assert result["samples"] == samples
        assert result["cpu_seconds"].keys() == {"hash", "hash_isal", "prepare", "write"}
        assert result["prepare_over_hash"] == result["cpu_seconds"]["hash"] / result["cpu_seconds"]["prepare"]
