"""The golden record: a refactoring changes no number. On the machine of the record every bit is compared."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.faults import Jobs
from tests.golden import numbers

RECORD: dict[str, Any] = json.loads(numbers.RECORD.read_text())
ELSEWHERE = 2e-4
"""Relative difference allowed on another CPU or another torch, whose sums round differently."""


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Numbers and texts of a tree by their path."""
    if isinstance(value, dict):
        return {k: v for name, child in value.items() for k, v in flat(child, f"{key}/{name}").items()}
    if isinstance(value, list):
        return {k: v for i, child in enumerate(value) for k, v in flat(child, f"{key}/{i}").items()}
    return {key: value}


def same(found: Any, recorded: Any) -> None:
    """Names under "renew" have changed in their last bits and wait for a record of that machine, without the list."""
    assert found.keys() == recorded.keys()
    for name in found:
        ours, theirs = flat(found[name]), flat(recorded[name])
        if numbers.machine() == RECORD["machine"] and name not in RECORD.get("renew", []):
            assert ours == theirs, name
        else:
            assert ours == pytest.approx(theirs, rel=ELSEWHERE, abs=1e-6), name


def test_plans_are_those_of_the_record_on_every_machine() -> None:
    assert numbers.plans() == RECORD["plans"]


def test_kernels_give_the_numbers_of_the_record() -> None:
    same(numbers.kernels(), RECORD["kernels"])


@pytest.mark.slow
def test_losses_are_those_of_the_record(jobs: Jobs) -> None:
    found = numbers.losses(jobs)
    assert [len(lines) for lines in found.values()] == [numbers.STEPS, numbers.STEPS]
    same(found, RECORD["losses"])
