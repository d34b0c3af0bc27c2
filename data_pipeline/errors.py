"""Exceptions for users' mistakes in data (folders, shards, settings), and the hint that goes with an unknown name.

One bad sample is a `schema.SampleError`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(Exception):
    """Something the user can mend; the message names the file or setting, the value and the way out."""


class ArgumentError(DataError):
    """A value that a generator does not take for `argument`; that is empty where an argument is missing."""

    def __init__(self, message: str, argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


class LoadError(DataError):
    """Loading failed in this process; other ranks may not know of it, so each reports its own."""


class UnreachableError(LoadError):
    """A store did not answer for as long as it was waited for: the same command may succeed later."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ "did you mean 'x'?" for an unknown name that is close to a known one; empty when none is."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""


def nearest(name: str, known: Iterable[str]) -> str:
    """Hint for an unknown name: "did you mean 'x'? (known: a, b, x)"; without a name that is near, "known: a, b, x"."""
    names = [str(candidate) for candidate in known]
    hint, listed = did_you_mean(name, names), f"known: {', '.join(names) or 'none'}"
    return f"{hint} ({listed})" if hint else listed
