"""Progress of long steps: a bar with time left on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LOG_SECONDS = 15.0
"""Time between two lines where there is no terminal."""


def say(text: str) -> None:
    """Print a line. A log file on a full disk costs the line, not the job; it is written when there is space again."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError:
        pass


class Progress:
    """A bar of `total` steps (None: unknown); `enabled=False` (all ranks but the first) shows nothing.

    Use as a context manager; call `advance` with whatever is worth showing.
    """

    def __init__(
        self,
        title: str,
        total: int | None,
        *,
        start: int = 0,
        enabled: bool = True,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`beat` is called whenever it advances, shown or not."""
        self._beat = beat
        self.title, self.total, self.done, self.enabled = title, total, start, enabled
        self._first, self._began, self._said = start, time.monotonic(), time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.enabled and sys.stdout.isatty():
            from rich import progress as rich

            columns = (
                rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn(),
                rich.TextColumn("{task.fields[notes]}"), rich.TimeElapsedColumn(),
                rich.TextColumn("left"), rich.TimeRemainingColumn(compact=True),
            )  # fmt: skip
            self._bar = rich.Progress(*columns)
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, notes="")
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.enabled and self.done > self._first and exc[0] is None:
            self.say(f"{self.title}: {self._count()} in {_duration(time.monotonic() - self._began)}")

    def advance(self, steps: int = 1, notes: str = "") -> None:
        """One or more steps further."""
        self.done += steps
        self._beat()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, notes=notes)
        elif self.enabled and time.monotonic() - self._said >= LOG_SECONDS:
            self._said = time.monotonic()
            pace = (self._said - self._began) / max(1, self.done - self._first)
            left = f"  {_duration(pace * (self.total - self.done))} left" if self.total is not None else ""
            self.say(f"{self.title}: {self._count()}  {notes}{left}")

    def _count(self) -> str:
        return f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        elif self.enabled:
            say(text)


@contextmanager
def data_progress(
    description: str, total: int | None, beat: Callable[[], None] = lambda: None
) -> Iterator[Callable[[int], None]]:
    """The same bar in the form that data_pipeline asks for."""
    with Progress(description, total, beat=beat) as bar:
        yield bar.advance


def _duration(seconds: float) -> str:
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"
