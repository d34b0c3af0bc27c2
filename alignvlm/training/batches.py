"""This rank's data, one optimizer step after the other: the steps that are left out, and data that cannot be loaded."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from data_pipeline.errors import LoadError
from data_pipeline.loading.collate import MicroBatch


@dataclass(frozen=True)
class StepBatches:
    """What a rank has for one optimizer step."""

    step: int
    """Number of the step in the plan, from 0."""
    micro_batches: list[MicroBatch]
    """One per accumulation step; empty after a failure."""
    data_wait: float
    """Seconds that this took."""
    failure: LoadError | None
    """Why this rank has no data."""


def step_batches(
    loader: Iterable[list[MicroBatch]], steps: Iterable[int], left_out: Collection[int]
) -> Iterator[StepBatches]:
    """The loader's batches of `steps`, which are consecutive, without those of the steps `left_out`.

    A failure is not raised but comes with the next step that is taken: the ranks agree on it in that step's first
    collective, so that none is left waiting for a rank that has ended.
    """
    batches = iter(loader)
    failure: LoadError | None = None
    for step in steps:
        began = time.perf_counter()
        micro_batches: list[MicroBatch] = []
        if failure is None:
            try:
                micro_batches = next(batches)
            except LoadError as error:
                failure = error
        data_wait = time.perf_counter() - began
        if step not in left_out:
            yield StepBatches(step, micro_batches, data_wait, failure)
