"""Batches of items to a model: what a batch needs is made in a thread while the model answers the one before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from alignvlm.evaluation.answering import Answerer
from alignvlm.evaluation.items import Item
from data_pipeline.samples.schema import SampleError

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Items that are answered together."""

    inputs: Any
    """What `Answerer.generate` takes; None where no item can be asked."""
    errors: Sequence[SampleError | None]
    """For each item, why it cannot be asked; None for one that can."""

    def answers(
        self, answerer: Answerer, max_new_tokens: int, until: Sequence[str] = (), **sampling: Any
    ) -> list[str | SampleError]:
        """An answer per item, in order; for an item that cannot be asked, the reason."""
        made = [] if self.inputs is None else answerer.generate(self.inputs, max_new_tokens, until, **sampling)
        answers = iter(made)
        return [next(answers) if error is None else error for error in self.errors]


def prepare_batch(answerer: Answerer, items: Sequence[Item]) -> Batch:
    """The items as one batch, without those that cannot be asked."""
    try:
        return Batch(answerer.prepare(items) if items else None, [None] * len(items))
    except SampleError as error:
        errors = [error] if len(items) == 1 else [prepare_batch(answerer, [item]).errors[0] for item in items]
    usable = [item for item, error in zip(items, errors, strict=True) if error is None]
    return Batch(answerer.prepare(usable) if usable else None, errors)


def ahead(made: Iterator[T]) -> Iterator[T]:
    """What an iterator gives, made in a thread, one ahead of its use."""
    end = object()
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(next, made, end)
        while (value := coming.result()) is not end:
            coming = thread.submit(next, made, end)
            yield value  # type: ignore[misc]
