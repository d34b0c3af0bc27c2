"""Starts the monitor of this process, and makes this process print its stacks when the monitor asks for them."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from alignvlm.system.monitor.heart import SIZE, Heart
from alignvlm.system.monitor.watch import STACKS

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = "import sys; sys.path.insert(0, sys.argv.pop(1)); from alignvlm.system.monitor.watch import main; main()"


class Monitor:
    """`with Monitor(limits) as heart:` lets a process of its own watch this one, as long as both live.

    It starts in 0.05 s, has 6 MB of its own and looks once a second (6.18, Python 3.11). It ends within a second of
    this process, however that ends.
    """

    def __init__(self, limits: Mapping[str, float], environment: Mapping[str, str] = os.environ) -> None:
        """`limits`: section of `system.timeline` -> seconds that it may go without progress."""
        self._limits = limits
        self._place = [environment.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"))]
        self._address = environment.get("MASTER_ADDR", "")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Heart:
        """Start it. Call it early: starting a process from a large one takes longer."""
        faulthandler.register(STACKS, file=2, all_threads=True)  # in C: also while the GIL is held
        file = _shared_file()
        try:
            heart = Heart(self._limits, file)
            heart.enter("imports")
            # Neither the user's environment nor site-packages: nothing that could hang or import much.
            program = [sys.executable, "-E", "-s", "-S", "-c", PROGRAM, str(ROOT)]
            self._process = subprocess.Popen(
                [*program, str(os.getpid()), str(file), *self._place, self._address],
                pass_fds=[file], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        finally:
            os.close(file)
        return heart

    def __exit__(self, *exc: object) -> None:
        """End it: nobody watches this process any more."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        faulthandler.unregister(STACKS)


def _shared_file() -> int:
    """A file without a name, which a child may inherit."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("alignvlm-heart")
    else:
        with tempfile.TemporaryFile() as temporary:
            file = os.dup(temporary.fileno())
    os.ftruncate(file, SIZE)
    return file
