"""The one exception for users' mistakes: the CLI prints its message as one line and exits with code 2."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """Something the user can mend; the message names the file, the key, the value and the way out."""


def shown(value: Any, most: int = 200) -> str:
    """A value of a recipe as errors show it: as YAML writes it, on one line, cut after `most` characters."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."
