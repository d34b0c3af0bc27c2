"""Start the processes of a job on this host when no launcher did: as many as the recipe says.

Clusters start the same program through launch/. This is for a single machine: it passes signals on, ends all processes
when one fails, and exits with the code of the first that failed, without a launcher's tracebacks around the error. No
process outlives it, however it ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType

from alignvlm.errors import UserError
from alignvlm.system.signals import REQUEUE
from data_pipeline.parallel import end_with_parent

GRACE_SECONDS = 30.0
"""How long the remaining processes get to end after one has failed, before they are killed."""
KILLED_SECONDS = 10.0
"""The same when that one was killed: the others wait for it in a collective, which on a GPU no signal ends."""
DELIVERY_SECONDS = 90.0
"""The same when that one has stopped early with everything saved: rank 0 may deliver its last metrics for a minute."""
RANK_0_SECONDS = 5.0
"""How long rank 0, which speaks for all, may still say why the job ends when another rank has ended first."""
SAVE_SECONDS = 300.0
"""The same after a signal, when they write a checkpoint; the variable ALIGNVLM_GRACE sets another number."""
END_WITH_PARENT = "ALIGNVLM_END_WITH_PARENT"
"""A launcher sets this variable for processes that must not outlive it (`end_with_launcher`)."""
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


def is_launched() -> bool:
    """Whether a launcher (torchrun, DeepSpeed, Slurm through launch/, or this file) has given this process its rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def end_with_launcher() -> None:
    """Save and end with the process that started this one, where it asked for that; its own children need not.

    A launcher that gets a signal may be gone before its ranks have saved.
    """
    if os.environ.pop(END_WITH_PARENT, ""):
        end_with_parent(os.getppid(), grace=_save_seconds())


def run_local(command: list[str], processes: int) -> int:
    """Run a command as `processes` ranks of one job; returns the exit code of the first that failed, or 0."""
    save_seconds = _save_seconds()
    shared = os.environ | {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes))),
        END_WITH_PARENT: "1",
    }
    ranks: list[subprocess.Popen[bytes]] = []
    asked: list[str] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(signal.Signals(number).name)
        # Ctrl-C reaches the ranks by itself, and a second one would end them at once.
        _send(ranks, signal.SIGTERM if number == signal.SIGINT else number)

    previous = {
        number: signal.signal(number, pass_on)
        for number in PASSED_ON
        if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN)  # started by nohup
    }
    try:
        tie = _tie_to(os.getpid())
        for rank in range(processes):
            environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(subprocess.Popen(command, env=environment, preexec_fn=tie))
        if asked:  # while they were started
            _send(ranks, signal.SIGTERM)
        return _wait(ranks, asked, save_seconds)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _save_seconds() -> float:
    text = os.environ.get("ALIGNVLM_GRACE", str(SAVE_SECONDS))
    try:
        return float(text)
    except ValueError:
        raise UserError(f"ALIGNVLM_GRACE is {text!r}: give the seconds that saving may take, such as 300") from None


def _wait(ranks: list[subprocess.Popen[bytes]], asked: list[str], save_seconds: float) -> int:
    """Wait until all have ended; after the first failure or signal the others get a grace period."""
    failed, reason, deadline = 0, "", float("inf")
    ask_at: float | None = None
    while running := [rank for rank in ranks if rank.poll() is None]:
        codes = [rank.returncode for rank in ranks if rank.returncode]
        if asked and not reason:
            reason, deadline = asked[0], time.monotonic() + save_seconds
        if codes and not failed:
            failed, reason = codes[0], reason or f"exit code {_exit_code(codes[0])} of another"
            may_deliver = failed == REQUEUE and ranks[0] in running
            grace = KILLED_SECONDS if failed < 0 else DELIVERY_SECONDS if may_deliver else GRACE_SECONDS
            deadline = min(deadline, time.monotonic() + grace)
            ask_at = time.monotonic() + RANK_0_SECONDS
        if ask_at is not None and (ranks[0] not in running or time.monotonic() > ask_at):
            ask_at = None
            _send(running, signal.SIGTERM)
        if time.monotonic() > deadline:
            which = f"{len(running)} of {len(ranks)} processes"
            print(f"alignvlm: killing {which} that did not end after {reason}", file=sys.stderr)
            for process in _families(running):
                _kill(process, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.1)
    codes = [rank.returncode for rank in ranks if rank.returncode]
    return _exit_code(failed or (codes[0] if codes else 0))


def _exit_code(code: int) -> int:
    """A process's return code as a shell shows it."""
    return 128 - code if code < 0 else code


def _send(ranks: Iterable[subprocess.Popen[bytes]], number: int) -> None:
    """Signal the ranks that run, and let stopped ones and their loader processes continue, so that they can save."""
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        rank.send_signal(number)
    for process in _families(running):
        _kill(process, signal.SIGCONT)


def _families(ranks: Iterable[subprocess.Popen[bytes]]) -> list[int]:
    """Process ids of ranks and, on Linux, of all that they started."""
    found = [rank.pid for rank in ranks]
    for process in found:  # it grows meanwhile
        for children in Path(f"/proc/{process}/task").glob("*/children"):
            try:
                found += map(int, children.read_text(encoding="ascii").split())
            except OSError:  # it has ended
                continue
    return found


def _kill(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def _tie_to(parent: int) -> Callable[[], None] | None:
    """What a child does before its program starts: it asks the kernel to kill it when the parent ends. Linux only."""
    if sys.platform != "linux":
        return None  # the variable END_WITH_PARENT does it there
    prctl = ctypes.CDLL(None).prctl

    def tie() -> None:
        prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != parent:  # it had ended before
            os._exit(1)

    return tie


def free_port() -> int:
    """A TCP port that is free now, for the rendezvous of a job on one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
