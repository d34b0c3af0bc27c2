"""`benchmarks/checkpoint.py --tiny`: every way saves and loads; the table has all of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.checkout import ROOT
from tests.jobs import job_environment


def test_every_way_saves_and_loads(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint.py"), "--tiny", "--folder", str(tmp_path)]
    environment = job_environment(BENCHMARK_RESULTS=str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = re.findall(r"^\| (ours|torch.save|async_save) \|((?: \d+\.\d\d s \(\d+\.\d\d\) \|){4})$", done.stdout, re.M)
    assert [name for name, _ in rows] == ["ours", "torch.save", "async_save"]
    assert re.search(r"^\| plain copy, writing, reading \|( \d+\.\d\d s \|){4}$", done.stdout, re.M)
    assert os.listdir(tmp_path) == []  # nothing is left, and no result is written
