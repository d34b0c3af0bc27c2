"""`benchmarks/failures/restart.py --tiny`: a killed job starts again, and the parts of its pause add up."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkout import ROOT
from tests.jobs import job_environment


@pytest.mark.faults
def test_a_killed_job_is_measured_up_to_its_next_step(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "failures" / "restart.py"), "--tiny"]
    environment = job_environment(BENCHMARK_RESULTS=str(tmp_path / "results"), TMPDIR=str(tmp_path))
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {name: float(seconds) for name, seconds in re.findall(r"^\| (.+) \| (\d+\.\d\d) \|$", done.stdout, re.M)}
    cpu, whole = rows.pop("CPU seconds"), rows.pop("kill to next step")
    assert sum(rows.values()) == pytest.approx(whole, abs=0.1)
    assert rows["imports"] > 0.5
    assert 0.5 < cpu < 2 * whole
    assert not list(tmp_path.glob("restart-benchmark-*"))
    assert not (tmp_path / "results").exists()
