"""Starts the monitor of this process, and makes this process print its stacks when the monitor asks for them."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from alignvlm.system.monitor.heart import SIZE, Heart, Limit
from alignvlm.system.monitor.peers import bound
from alignvlm.system.monitor.watch import STACKS

log = logging.getLogger(__name__)
OFF = "ALIGNVLM_NO_MONITOR"
"""Set to anything, this variable leaves ranks without monitors: for a debugger that works within the process (pdb)."""
PAUSE_SECONDS = 30.0
"""Longest pause before another monitor is started. One that ends is replaced at once; when one after the other ends
within this time of its start, the next ones are started after 1, 2, 4 s and so on."""
ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from alignvlm.system.monitor.watch import main; main()"


class Monitor:
    """`with Monitor(limits) as heart:` lets a process of its own watch this one, as long as both live.

    It starts in 0.05 s, has 6 MB of its own and looks once a second (6.18, Python 3.11). It ends within a second of
    this process, however that ends. When something ends it before, this process goes on, says so and starts another.

    Rank 0 keeps the socket to which the other ranks' monitors speak, so that each of its own monitors listens there.
    """

    def __init__(self, limits: Mapping[str, Limit]) -> None:
        """`limits`: section of `system.timeline` -> how long it may go without progress."""
        self._limits = limits
        self._place = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
        self._address = os.environ.get("MASTER_ADDR", "")
        self._next = math.inf if os.environ.get(OFF) else 0.0
        """When another one may be started."""
        self._started = 0.0
        self._pause = 0.0
        """How long the monitor that ends next is not replaced."""
        self._process: subprocess.Popen[bytes] | None = None
        self._file, self._pid = -1, os.getpid()
        self._socket: socket.socket | None = None
        self._looking = threading.Lock()

    def __enter__(self) -> Heart:
        """Start it. Call it early: starting a process from a large one takes longer."""
        faulthandler.register(STACKS, file=2, all_threads=True)  # in C: also while the GIL is held
        self._file = _shared_file()
        if self._place[0] == "0" and int(self._place[1]) > 1 and self._next < math.inf:
            self._socket = bound(self._address)
        heart = Heart(self._limits, self._file, self._look, self._socket.getsockname()[1] if self._socket else 0)
        if self._next < math.inf:
            self._start()
        heart.enter("imports")
        return heart

    def __exit__(self, *exc: object) -> None:
        """End it: nobody watches this process any more."""
        process, self._process, self._next = self._process, None, math.inf  # a thread that looks now replaces nothing
        if process is not None:
            process.kill()
            process.wait()
        os.close(self._file)
        if self._socket is not None:
            self._socket.close()
        faulthandler.unregister(STACKS)

    def _start(self) -> None:
        self._started = time.monotonic()
        listens = -1 if self._socket is None else self._socket.fileno()
        files = [self._file] if listens < 0 else [self._file, listens]
        # Neither the user's environment nor site-packages: nothing that could hang or import much.
        program = [sys.executable, "-E", "-s", "-S", "-c", PROGRAM, str(ROOT)]
        try:
            self._process = subprocess.Popen(
                [*program, str(os.getpid()), str(self._file), *self._place, str(listens)],
                pass_fds=files, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        except OSError as error:  # no memory, too many processes
            self._next = time.monotonic() + PAUSE_SECONDS
            log.warning("%s has no monitor now, a hang of it would go unnoticed: %s", self._rank, error)

    def _look(self) -> None:
        """Is the monitor there? Processes that this one has forked have none."""
        if os.getpid() != self._pid or not self._looking.acquire(blocking=False):
            return
        try:
            if self._process is not None:
                code = self._process.poll()
                if code is None:
                    return
                self._process = None
                how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
                wait = 0.0 if time.monotonic() > self._started + PAUSE_SECONDS else self._pause
                self._pause = min(max(1.0, 2 * wait), PAUSE_SECONDS)
                if self._next < math.inf:  # else this process ends
                    self._next = time.monotonic() + wait
                when = f" in {wait:.0f} s; a hang of it would go unnoticed until then" if wait else ""
                log.warning("the monitor of %s has ended (%s); another one is started%s", self._rank, how, when)
            if time.monotonic() >= self._next:
                self._start()
        finally:
            self._looking.release()

    @property
    def _rank(self) -> str:
        return f"rank {self._place[0]} on {os.uname().nodename}"


def _shared_file() -> int:
    """A file without a name, which a child may inherit."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("alignvlm-heart")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, SIZE)
    return file
