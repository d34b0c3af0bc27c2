"""Process pools: their processes end when the process that uses them is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.checkout import ROOT
from tests.waiting import runs, until

PROGRAM = """
import os, signal
from data_pipeline.parallel import pool
def work(number):
    open(str(os.getpid()), "w").close()
with pool(2, 2) as executor:
    list(executor.map(work, range(2)))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_pool_ends_with_a_killed_parent(tmp_path: Path) -> None:
    program = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{PROGRAM}"]
    assert subprocess.run(program, cwd=tmp_path).returncode == -9
    workers = [int(path.name) for path in tmp_path.iterdir()]
    assert workers
    until(lambda: not any(map(runs, workers)), seconds=5)
