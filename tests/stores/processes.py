"""Servers of tests as processes: started when a block begins, waited for, and gone with everything when it ends."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 90


def program(name: str, way_out: str, *places: Path) -> str:
    """The path of a program: from PATH, this environment's programs, or `places`. Raises RuntimeError."""
    path = os.pathsep.join([str(Path(sys.executable).parent), *map(str, places), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise RuntimeError(f"{name} is missing: {way_out}")
    return found


@contextmanager
def running(
    command: Sequence[str], folder: Path, port: int, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A server whose `port` of loopback answers. It writes to `folder`, and is killed: nothing of it is kept."""
    log = folder / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        began = time.monotonic()
        while not _answers(port):
            if process.poll() is not None or time.monotonic() - began > START_SECONDS:
                said = log.read_text(encoding="utf-8", errors="replace")
                raise RuntimeError(f"{command[0]} did not start: {said[-2000:]}")
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def free_ports(count: int) -> list[int]:
    """Free ports; those 10,000 above them, which SeaweedFS takes for itself, are free too."""
    found: list[int] = []
    for port in range(20_000 + os.getpid() * 16 % 15_000, 45_000):
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", port))
                other.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError("no free ports")


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True
