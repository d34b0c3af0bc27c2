"""The end of a process: what `sys.exit` would still do is done, and no object is taken apart."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.jobs import ROOT, job_environment

PROGRAM = """
import atexit, ctypes, sys, threading, time
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
files = [open(sys.argv[1], "w"), open(sys.argv[2], "wb")]
files[0].write("text")
files[1].write(b"bytes")
ctypes.CDLL(None).printf(b"C has said, ")
print("said", end=", ")
print("complained", end="", file=sys.stderr)
leave(7)
"""


def test_a_process_that_leaves_does_all_but_to_free_its_objects(tmp_path: Path) -> None:
    files = [tmp_path / "text", tmp_path / "bytes"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *files], cwd=ROOT, env=job_environment() | {"PYTHONUNBUFFERED": ""},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    said = "said, the thread has ended\nat exit\nC has said, "
    assert (done.returncode, done.stdout, done.stderr) == (7, said, "complained")
    assert [file.read_text() for file in files] == ["text", "bytes"]


def test_a_thread_that_waits_for_a_terminal_does_not_hold_the_end_up() -> None:
    program = (
        "import threading, time\n"
        "from alignvlm.system.leaving import leave\n"
        "threading.Thread(target=input, daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "leave(7)\n"
    )
    ours, its = os.openpty()
    try:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, cwd=ROOT, env=job_environment(), stdin=its, stdout=its, timeout=60, check=False)
    finally:
        os.close(ours)
        os.close(its)
    assert done.returncode == 7
