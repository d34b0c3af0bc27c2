"""The process that holds a lease: how a lease names it, and whether it still runs, as far as that is seen from here."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path

_EXITING = 0x4
"""PF_EXITING among the flags of /proc/<pid>/stat."""


@dataclass(frozen=True)
class Holder:
    """The process that trains in a run folder: rank 0 of a job."""

    host: str
    pid: int
    started: int
    """When the process was started, in clock ticks since its host's boot; 0 where the system does not say."""
    boot: str
    """Identifies a running kernel; the host's name where the system has no such number."""
    processes: str
    """Identifies the space that `pid` belongs to: containers have their own."""
    job: str
    """The scheduler's job, or ""."""
    attempt: int
    """How often the scheduler had put this job back into the queue."""
    since: str
    token: str
    """Unique: tells this lease from all others."""

    @classmethod
    def this_process(cls, environment: Mapping[str, str] = os.environ) -> Holder:
        """What this process writes into its lease."""
        host, job = socket.gethostname(), environment.get("SLURM_JOB_ID", "")
        return cls(
            host=host,
            pid=os.getpid(),
            started=_start_of(os.getpid()) or 0,
            boot=_read_text("/proc/sys/kernel/random/boot_id") or host,
            processes=_link("/proc/self/ns/pid"),
            job=f"{environment.get('SLURM_CLUSTER_NAME', 'slurm')}/{job}" if job else "",
            attempt=int(environment.get("SLURM_RESTART_COUNT") or 0),
            since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            token=uuid.uuid4().hex,
        )

    @classmethod
    def parse(cls, content: bytes) -> Holder | None:
        """The holder that a lease names; None for anything else, such as a file that a crash cut short."""
        try:
            values = json.loads(content.partition(b"\n")[0])
        except (ValueError, RecursionError):
            return None
        kinds = {field.name: int if field.type == "int" else str for field in fields(cls)}
        if not isinstance(values, dict) or values.keys() != kinds.keys():
            return None
        if not all(type(values[name]) is kind for name, kind in kinds.items()):
            return None
        return cls(**values)

    def __str__(self) -> str:
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"

    def gives_way_to(self, other: Holder) -> bool:
        """Whether the scheduler has put the holder's job back into the queue and started it again as `other`."""
        return self.job != "" and self.job == other.job and self.attempt < other.attempt

    def is_alive(self, me: Holder, lease: Path) -> bool | None:
        """Whether the holder's process runs; None when that cannot be seen from here."""
        if self.boot != me.boot:
            return None
        locked = _is_locked(lease)
        if self.processes != me.processes:
            return locked
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            pass  # another user's
        started = _start_of(self.pid)
        if started == self.started and locked is False:
            return None  # the file may be a copy, in a folder where that process does not train
        return None if started is None else started == self.started


def _is_locked(lease: Path) -> bool | None:
    """Whether a process of this kernel, in whatever container, holds the file locked as a living holder does."""
    try:
        descriptor = os.open(lease, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    except OSError:  # no locks here
        return None
    finally:
        os.close(descriptor)


def _start_of(pid: int) -> int | None:
    """When a running process was started, in clock ticks; 0 when it is ending, None when the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            values = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    ending = values[0] in (b"Z", b"X") or int(values[6]) & _EXITING
    return 0 if ending else int(values[19])


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""
