"""Progress of long data work: one tiny interface, silent by default; the command line brings a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Called with a description and a total (None: unknown); the context gives a function that advances by a count."""

    def __call__(self, description: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]: ...


@contextmanager
def silent(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows nothing."""
    yield lambda count: None
