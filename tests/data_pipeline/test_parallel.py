"""Process pools: their processes end when the process that uses them is killed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from tests.checkout import ROOT

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
    workers = [Path("/proc", path.name, "stat") for path in tmp_path.iterdir()]
    assert workers
    deadline = time.monotonic() + 5
    while any(worker.exists() and b") Z " not in worker.read_bytes() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
