"""How long is waited: numbers in environment variables."""

from __future__ import annotations

import os

from data_pipeline.errors import DataError

_MOST = 1e9


def number(name: str, default: float, least: float = 0.0) -> float:
    """The number that an environment variable holds, `default` where it is not set or empty.

    Raises:
        DataError: it holds no number, or one below `least` or above 10^9.
    """
    text = os.environ.get(name, "").strip()
    try:
        value = float(text or default)
    except ValueError:
        value = -1.0
    if not least <= value <= _MOST:  # nan neither
        raise DataError(f"{name}={text!r} is no number of at least {least:g}")
    return value
