"""What Linux says about a process: whether it is stopped, and how many bytes it and its children move."""

from __future__ import annotations

import os

STATES = {
    "T": "stopped (SIGSTOP, Ctrl-Z)",
    "t": "stopped by a debugger",
    "D": "in a system call that cannot be interrupted (a disk or a network file system)",
    "R": "computing",
    "S": "sleeping or waiting",
    "Z": "dead",
}


def state(pid: int) -> str:
    """One letter of STATES; "" where the system does not say."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0].decode()
    except (OSError, IndexError):
        return ""


def is_traced(pid: int) -> bool:
    """Whether a debugger, or a tracer of system calls, is attached to a process."""
    try:
        with open(f"/proc/{pid}/status", "rb") as file:
            return any(line.startswith(b"TracerPid:") and int(line.split()[1]) != 0 for line in file)
    except (OSError, ValueError):
        return False


def moved_bytes(pid: int) -> int:
    """Bytes that a process and all that it started have read and written so far, in files and connections."""
    total, pids = 0, [pid]
    for each in pids:  # it grows meanwhile
        total += _own_bytes(each)
        pids += _children(each)
    return total


def _own_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/io", "rb") as file:
            lines = dict(line.split(b": ") for line in file)
    except (OSError, ValueError):
        return 0
    # Pages of mapped files count in read_bytes only, those of connections in rchar only.
    return sum(int(lines.get(name, 0)) for name in (b"rchar", b"wchar", b"read_bytes"))


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children", "rb") as file:
                found += map(int, file.read().split())
    except OSError:  # it has ended meanwhile
        pass
    return found
