"""The end of a process: what `sys.exit` would still do is done, and no object is taken apart."""

from __future__ import annotations

import subprocess
import sys

from tests.jobs import ROOT, job_environment

PROGRAM = """
import atexit, sys, threading, time
from alignvlm.system.leaving import leave

class Kept:
    def __del__(self):
        print("taken apart")

def work():
    time.sleep(0.2)
    print("the thread has ended")

kept = Kept()
atexit.register(print, "at exit")
threading.Thread(target=work).start()
threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
print("said", end=", ")
print("complained", end="", file=sys.stderr)
leave(7)
"""


def test_a_process_that_leaves_does_all_but_to_free_its_objects() -> None:
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, cwd=ROOT, env=job_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "said, the thread has ended\nat exit\n", "complained")
