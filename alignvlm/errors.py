"""The one exception for users' mistakes: the CLI prints its message as one line and exits with code 2."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Something the user can mend; the message names the file, the key, the value and the way out."""


def shown(value: Any, most: int = 80) -> str:
    """A value of a recipe as errors show it: as YAML writes it, on one line, cut after `most` characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def reason(error: BaseException) -> str:
    """What a library says in its exception, on one line: its cause where it only wraps one."""
    cause = error.__cause__ or error
    text = " ".join(str(cause).split())
    if not text or isinstance(cause, KeyError):  # whose text is the key alone
        text = f"{type(cause).__name__} {text}".rstrip()
    return text if len(text) <= 300 else f"{text[:297]}..."
