"""What a job does when: a line as each section of rank 0's time begins, from the start of its process to its end.

`alignvlm.report.goodput` reads them. A line is written when a section begins, not when it ends: so a job that is killed
shows what it was at.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import psutil

from alignvlm.system.monitor.heart import Heart
from data_pipeline.files import JsonLinesLog

STARTED = "ALIGNVLM_STARTED"
"""The variable in which a launcher tells the ranks when it was started, in seconds since 1970."""

Section = Literal[
    "imports", "prepare", "rendezvous", "engine", "load", "steps", "save", "evaluation", "export", "report", "delivery",
    "end",
]  # fmt: skip
"""What rank 0 is at: importing its modules; preparing the run; meeting the other ranks; building a stage's model and
engine; loading its checkpoint; optimizer steps; a save for which training waits; measuring scores; writing an export;
the report; the last delivery to MLflow; nothing more."""


class Timeline:
    """`with Timeline(path, …):` notes a job's sections until its end; ranks without a path tell their monitor only."""

    def __init__(
        self,
        path: Path | None = None,
        began: float = 0.0,
        imported: float = 0.0,
        heart: Heart | None = None,
        **facts: Any,
    ) -> None:
        """Nothing is written yet.

        Args:
        path: the file, or None on all ranks but 0.
        began: when the job was started, in seconds since 1970.
        imported: when its modules were there.
        heart: tells this rank's monitor.
        facts: what describes the job in its first line.
        """
        self._log = None if path is None else JsonLinesLog(path)
        self._heart = heart or Heart()
        self._began, self._imported, self._facts = began, imported, facts
        self._section: Section = "imports"
        self.finished = False
        """Whether the run is finished; set before the end."""

    def __enter__(self) -> Timeline:
        self._note("imports", self._began, host=socket.gethostname(), **self._facts)
        self._note("prepare", self._imported)
        return self

    def __exit__(self, *exc: object) -> None:
        self.end()

    def enter(self, section: Section) -> None:
        """From now on this rank is in this section."""
        self._note(section, time.time())

    @contextmanager
    def during(self, section: Section) -> Iterator[None]:
        """A section within another one, which goes on afterwards."""
        before = self._section
        self.enter(section)
        yield
        self.enter(before)

    def end(self) -> None:
        """The job ends; safe in a signal handler that ends the process."""
        if self._log is not None and self._section != "end":
            self._note("end", time.time(), finished=self.finished)
            self._log.close()

    def _note(self, section: Section, moment: float, **facts: Any) -> None:
        self._section = section
        self._heart.enter(section)
        if self._log is not None:
            self._log.append({"time": moment, "section": section, **facts})


def job_start() -> float:
    """When the first process of this job on this host was started, in seconds since 1970."""
    try:
        return min(_process_start(), float(os.environ[STARTED]))
    except (KeyError, ValueError):
        return _process_start()


def _process_start() -> float:
    """When this process was started. On Linux to 10 ms; psutil knows the time of boot there to a second only."""
    try:
        ticks = int(
            Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
        )
        return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError):
        return psutil.Process().create_time()
