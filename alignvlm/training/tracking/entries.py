"""What MLflow takes: names, values and lengths of metrics, parameters and tags, made from whatever the files hold."""

from __future__ import annotations

import hashlib
import posixpath
import re
import time
from collections.abc import Iterator
from typing import Any

MAX_KEY = 250
MAX_PARAM = 6000
MAX_TAG = 8000
NOT_METRICS = ("stage", "step", "epoch", "time")
MAX_TIME = 1e11
"""Seconds: a time beyond this is none."""


def clean_key(key: str) -> str:
    """A name that MLflow takes: other characters than letters, digits and `/_-.: ` become `_`; at most 250 of them."""
    clean = re.sub(r"[^/\w.\- :]", "_", clean_text(key))
    if posixpath.normpath(clean) != clean or clean.startswith(("/", "..")) or clean == ".":  # it would name a folder
        clean = "/".join("_" if part in ("", ".", "..") else part for part in clean.split("/"))
    if len(clean) > MAX_KEY:
        clean = f"{clean[: MAX_KEY - 9]}-{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:8]}"
    return clean


def clean_text(value: object, length: int | None = None) -> str:
    """Text that every database takes: no lone surrogates, no NUL, at most `length` characters."""
    return str(value).encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")[:length]


def metrics_of(record: dict[str, Any]) -> Iterator[tuple[str, float, int]]:
    """(name, value, milliseconds since 1970) of the numbers in a line of metrics.jsonl; what is no number is left."""
    moment = number(record.get("time"))
    if moment is None or not 0 <= moment < MAX_TIME:
        moment = time.time()
    for key, value in flatten({k: v for k, v in record.items() if k not in NOT_METRICS}).items():
        value = number(value)
        if value is not None:
            yield clean_key(key), value, int(moment * 1000)


def number(value: Any) -> float | None:
    """A number as MLflow keeps it, NaN and infinities included; None for anything else."""
    if not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"lr": {"vision": 1}} to {"lr/vision": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
