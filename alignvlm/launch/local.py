"""Start the processes of a job on this host when no launcher did: one per GPU or as many as the recipe says.

Clusters start the same program through launch/. This is for a single machine: it hands signals on, ends all processes
when one fails, and exits with the code of the first that failed, without a launcher's tracebacks around the error.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from types import FrameType

GRACE_SECONDS = 30.0
"""Between asking the remaining processes to end and killing them."""


def is_launched() -> bool:
    """Whether a launcher (torchrun, DeepSpeed, Slurm through launch/, or this file) has given this process its rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def run_local(command: list[str], processes: int) -> int:
    """Run a command as `processes` ranks of one job; returns the exit code of the first that failed, or 0."""
    shared = os.environ | {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
    }
    ranks = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]

    def hand_on(number: int, frame: FrameType | None) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the ranks by itself
    try:
        return _wait(ranks)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Until all have ended; after the first failure the others get a grace period."""
    failed, deadline = 0, float("inf")
    while any(rank.poll() is None for rank in ranks):
        codes = [rank.returncode for rank in ranks if rank.returncode]
        if codes and not failed:
            failed, deadline = codes[0], time.monotonic() + GRACE_SECONDS
            for rank in ranks:
                if rank.poll() is None:
                    rank.terminate()
        if time.monotonic() > deadline:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
        time.sleep(0.1)
    codes = [rank.returncode for rank in ranks if rank.returncode]
    code = failed or (codes[0] if codes else 0)
    return 128 - code if code < 0 else code


def free_port() -> int:
    """A TCP port that is free now, for the rendezvous of a job on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
