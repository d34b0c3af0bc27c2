"""The processes of a job as those see them who share work: which one this is, and how all of them hear of each other.

`training.distributed.World` has them in a process group, `ALONE` is a lone process.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from alignvlm.errors import UserError
from data_pipeline.errors import DataError

T = TypeVar("T")
MISTAKES = (UserError, DataError)
"""Errors of one rank that reach the others; after any other one a launcher ends them."""


def is_rank_0() -> bool:
    """Whether this process is rank 0 of its job, or alone: by its environment, before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


class Ranks(ABC):
    """One of `size` processes that call the same functions in the same order."""

    rank: int
    size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def beat(self) -> None:  # noqa: B027  (most have nobody who watches)
        """This process has made progress, for whoever watches it."""

    @abstractmethod
    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""

    @abstractmethod
    def all_gather(self, value: Any) -> list[Any]:
        """All ranks' values, in rank order, on all ranks."""

    def raise_of_main(self, error: Exception | None) -> None:
        """Raise rank 0's error, if it has one, on all ranks: none is left waiting for a rank that has ended."""
        _raise_first([self.broadcast(_sendable(error))])

    def first_problem(self, problem: str | None) -> str | None:
        """The first problem of any rank, on all ranks; None where none has one."""
        return next((found for found in self.all_gather(problem) if found is not None), None)

    def of_main(self, work: Callable[..., T], *arguments: Any) -> T:
        """What rank 0 gets from `work`, on all ranks; a UserError or DataError of it is raised on all."""
        value, problem = None, None
        if self.is_main:
            try:
                value = work(*arguments)
            except MISTAKES as error:
                problem = error
        self.raise_of_main(problem)
        return self.broadcast(value)

    def together(self, work: Callable[..., T], *arguments: Any) -> T:
        """What this rank gets from `work`, when all ranks have done theirs.

        A UserError or DataError, of the first rank that has one, is raised on all.
        """
        value, problem = None, None
        try:
            value = work(*arguments)
        except MISTAKES as error:
            problem = error
        _raise_first(self.all_gather(_sendable(problem)))
        return value  # type: ignore[return-value]  # there was no error


class _Alone(Ranks):
    rank, size = 0, 1

    def broadcast(self, value: Any) -> Any:
        return value

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


ALONE = _Alone()
"""A lone process."""


def _sendable(error: Exception | None) -> tuple[Exception | None, OSError | None]:
    """An error with its cause, which pickle leaves out, where that is of the system and decides the exit code."""
    cause = error and error.__cause__
    return error, cause if isinstance(cause, OSError) else None


def _raise_first(found: list[tuple[Exception | None, OSError | None]]) -> None:
    for error, cause in found:
        if error is not None:
            raise error from (error.__cause__ or cause)
