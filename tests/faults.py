"""Real jobs that import nothing, and faults planted in them: of twelve kinds, in four places.

Ranks are forked from a process that has imported everything, so that a job of tiny models takes two seconds: everything
behind the imports is the program as users run it, its monitors and the waiting of `alignvlm.launch.local` included.
Signals to a whole job and what a start costs need `tests.jobs.start`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.jobs import copy_store, job_environment

PLACES = ("start", "step", "save", "evaluation")
SECTION = {"start": "engine", "step": "steps", "save": "save", "evaluation": "evaluation"}
"""Place -> section of the timeline."""
JOB_SECONDS = 240.0
"""After so long a job is killed: a test must not wait for one that hangs."""
SAVED = 75
CODES = {
    "exception": 1,
    "exception in a signal handler": 1,
    "abort": 128 + signal.SIGABRT,
    "segfault": 128 + signal.SIGSEGV,
    "SIGKILL": 128 + signal.SIGKILL,
    "SIGINT": SAVED,
    "SIGTERM": SAVED,
    "GIL held": 128 + signal.SIGKILL,
    "SIGSTOP": 128 + signal.SIGKILL,
}
"""Fault that ends a job -> exit code of the rank that has it."""
HANGS = ("GIL held", "SIGSTOP")
HARMLESS = ("slow rank", "exception in a thread")
"""What a job survives."""


class PlantedError(RuntimeError):
    """Stands for any error of a rank's own."""


def fail(*arguments: object) -> None:
    raise PlantedError("planted")


def fail_in_a_thread() -> None:
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()


def fail_in_a_handler() -> None:
    signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(60)


def hold_the_gil() -> None:
    while True:
        ctypes.PyDLL(None).sleep(600)  # the C library's, without letting the GIL go


def fail_on_the_gpu() -> None:
    import torch

    torch.zeros(2, device="cuda")[torch.tensor([7], device="cuda")].sum().item()


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


FAULTS: dict[str, Callable[[], Any]] = {
    "CUDA error": fail_on_the_gpu,
    "slow rank": lambda: time.sleep(0.2),
    "exception": fail,
    "exception in a thread": fail_in_a_thread,
    "exception in a signal handler": fail_in_a_handler,
    "abort": os.abort,
    "GIL held": hold_the_gil,
    "segfault": lambda: ctypes.string_at(0),
    "SIGINT": send(signal.SIGINT),
    "SIGKILL": send(signal.SIGKILL),
    "SIGTERM": send(signal.SIGTERM),
    "SIGSTOP": send(signal.SIGSTOP),
}


def plant(fault: str, place: str) -> None:
    """Let this process have a fault in a place: once, or as often as it comes there where the fault is harmless.

    In steps it is the second one: the first is done when it comes.
    """
    from alignvlm.evaluation.answering import ModelAnswerer
    from alignvlm.training import stage
    from alignvlm.training.checkpoints.store import CheckpointStore

    passed = 0

    def before(function: Callable[..., Any], is_due: Callable[..., bool]) -> Callable[..., Any]:
        def faulty(*arguments: Any, **named: Any) -> Any:
            nonlocal passed
            if is_due(*arguments):
                passed += 1
                if passed == 1:
                    print(f"planted: {fault} in {place}", flush=True)
                if passed == 1 or fault in HARMLESS:
                    FAULTS[fault]()
            return function(*arguments, **named)

        return faulty

    if place == "start":
        stage.build_trainer = before(stage.build_trainer, lambda *arguments: True)
    elif place == "step":
        first = []
        second = lambda trainer, *rest: bool(first) or bool(first.append(trainer))
        stage.train_step = before(stage.train_step, second)
    elif place == "save":
        CheckpointStore.finish = before(CheckpointStore.finish, lambda store, *rest: store._pending is not None)  # type: ignore[method-assign]
    else:
        ModelAnswerer.generate = before(ModelAnswerer.generate, lambda *arguments: True)  # type: ignore[method-assign]


@dataclass(frozen=True)
class Ended:
    """What became of a job."""

    code: int
    """Exit code of the job: that of the first rank that failed, or 0."""
    codes: list[int]
    """Of every rank."""
    output: str
    seconds: float


class Jobs:
    """`with Jobs(folder) as jobs:` starts jobs in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def at(self, folder: Path) -> Jobs:
        """The same for another folder, as long as this one is open."""
        other = Jobs(folder)
        other._server = self._server
        return other

    def __enter__(self) -> Jobs:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults"], env=job_environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        return self

    def __exit__(self, *exc: object) -> None:
        os.killpg(self._server.pid, signal.SIGKILL)
        self._server.communicate()

    def train(
        self,
        arguments: Sequence[str],
        faults: Sequence[tuple[str, str]] = (),
        rank: int = 0,
        worker: str = "",
        patience: float = 0.5,
        processes: int = 2,
    ) -> Ended:
        """`alignvlm train` with these arguments.

        Args:
            faults: (fault, place) in a rank.
            worker: names of faults of tests/integration/fault_worker.py, in all ranks.
            patience: seconds in which rank 0 may still speak when another rank has ended first.
            processes: ranks; this is what decides, not the recipe.
        """
        copy_store(self._folder / "runs")
        number, began = len(list(self._folder.glob("job-*.log"))), time.monotonic()
        output = self._folder / f"job-{number}.log"
        job = {
            "folder": str(self._folder), "output": str(output), "arguments": list(arguments),
            "faults": list(faults), "rank": rank, "worker": worker, "patience": patience,
            "processes": processes,
        }  # fmt: skip
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        assert answer, "the server of jobs has ended"
        return Ended(*json.loads(answer), output.read_text(errors="replace"), time.monotonic() - began)

    def finish(self, *arguments: str, processes: int = 2) -> str:
        """`alignvlm train` to its end without faults and without a tracker, which takes three seconds; the output."""
        ended = self.train(arguments, worker="untracked", processes=processes)
        assert ended.code == 0, f"exit code {ended.code}:\n{ended.output[-4000:]}"
        return ended.output


class Rank:
    """A forked rank as `alignvlm.launch.local` sees a started one."""

    def __init__(self, pid: int) -> None:
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def serve() -> int:
    """Run the jobs that are asked for on the standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    import deepspeed  # noqa: F401  (what a rank imports)
    import numpy as np
    import torch

    from alignvlm.cli import main
    from alignvlm.launch import local
    from alignvlm.system.leaving import leave
    from alignvlm.training import run  # noqa: F401
    from tests.integration import fault_worker

    local.KILLED_SECONDS = 5.0
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()  # a collection in a rank would copy every page of these imports
    for line in iter(sys.stdin.readline, ""):
        job = json.loads(line)
        port, ranks = local.free_port(), []
        for number in range(job["processes"]):
            pid = os.fork()
            if pid == 0:
                file = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(file, 1)
                os.dup2(file, 2)
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
                os.chdir(job["folder"])
                for seed in (random.seed, np.random.seed, torch.seed):  # else what nobody seeds is the same in all jobs
                    seed()
                world = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": job["processes"], "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
                for fault, place in job["faults"] if number == job["rank"] else ():
                    plant(fault, place)
                if job["worker"]:
                    fault_worker.plant(job["worker"].split(","))
                leave(main(["train", *job["arguments"]]))
            ranks.append(Rank(pid))
        local.RANK_0_SECONDS, local.GRACE_SECONDS, asked = job["patience"], 5.0 + job["patience"], []
        overdue = threading.Timer(JOB_SECONDS, asked.append, [f"{JOB_SECONDS:.0f} s"])
        overdue.start()
        code = local._wait(ranks, asked, 0.0)  # type: ignore[arg-type]
        overdue.cancel()
        overdue.join()  # no thread lives when the next ranks are forked
        codes = [local._exit_code(rank.returncode or 0) for rank in ranks]
        print(json.dumps([code, codes]), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(serve())
