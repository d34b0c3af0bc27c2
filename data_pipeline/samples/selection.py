"""Which samples of a source are used: a share, by the hash of their places, and conditions on their meta data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.errors import DataError, nearest

_CONDITIONS = ("min", "max", "not", "missing")


@dataclass(frozen=True)
class Selection:
    """Samples that are used; without arguments all of them. False when it leaves none out.

    Args:
        sample: share of the samples, above 0 and at most 1. A smaller share is part of a larger one.
        filter: field of the meta data (`a.b` is b inside a) -> what it must be: a value, a list of values, or a
            mapping of `min`, `max`, `not` (a value or a list) and `missing: true`, which also takes samples without the
            field. Of a field that is a list, such as ratings, every item must fit; an
            empty one counts as missing.

    Raises:
        DataError: a share or a condition that is none.
    """

    sample: float = 1.0
    filter: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.sample <= 1:
            raise DataError(f"sample is {self.sample:g}: a share above 0 and at most 1")
        for name, condition in self.filter.items():
            _check(name, condition)

    def __bool__(self) -> bool:
        return self.sample < 1 or bool(self.filter)

    @property
    def fingerprint(self) -> str:
        """Changes with the samples that are taken; empty when all are."""
        return json.dumps([self.sample, self.filter], sort_keys=True) if self else ""

    def takes_place(self, shard: str, key: str) -> bool:
        """Whether a sample of this place belongs to the share: the same for any number of processes."""
        place = hashlib.sha256(f"{shard}\n{key}".encode(errors="backslashreplace")).digest()
        return int.from_bytes(place[:8], "big") < self.sample * 2**64

    def takes(self, meta: Mapping[str, Any]) -> bool:
        """Whether a sample's meta data fit every condition."""
        return all(_fits(_field(meta, name), condition) for name, condition in self.filter.items())


def _check(name: str, condition: Any) -> None:
    if isinstance(condition, Mapping):
        unknown = next((key for key in condition if key not in _CONDITIONS), None)
        if unknown is not None:
            raise DataError(
                f"filter.{name} has the unknown condition {str(unknown)!r}: {nearest(unknown, _CONDITIONS)}"
            )
        for key in ("min", "max"):
            limit = condition.get(key, 0)
            if isinstance(limit, bool) or not isinstance(limit, int | float):
                raise DataError(f"filter.{name}.{key} is {limit!r}, not a number")
        values = condition.get("not", [])
    else:
        values = condition
    for value in values if isinstance(values, list) else [values]:
        if not isinstance(value, str | int | float | bool):
            raise DataError(f"filter.{name}: {value!r} is neither a text nor a number nor true or false")


def _field(meta: Any, name: str) -> Any:
    """The value of `a.b`, or of a field with that very name; None where there is none."""
    if isinstance(meta, Mapping):
        if name in meta:
            return meta[name]
        head, dot, rest = name.partition(".")
        if dot:
            return _field(meta.get(head), rest)
    return None


def _fits(value: Any, condition: Any) -> bool:
    value = None if value == [] else value
    if isinstance(condition, Mapping) and value is None:
        return condition.get("missing") is True
    return value is not None and all(
        _item_fits(item, condition) for item in (value if isinstance(value, list) else [value])
    )


def _item_fits(item: Any, condition: Any) -> bool:
    if not isinstance(condition, Mapping):
        return item in (condition if isinstance(condition, list) else [condition])
    if "min" in condition or "max" in condition:
        if isinstance(item, bool) or not isinstance(item, int | float):
            return False
        if not condition.get("min", item) <= item <= condition.get("max", item):
            return False
    refused = condition.get("not", [])
    return item not in (refused if isinstance(refused, list) else [refused])
