"""The data of a stage's steps: left-out steps are consumed, a failure comes with the next step that is taken."""

from __future__ import annotations

from collections.abc import Iterator

from alignvlm.training.batches import step_batches
from data_pipeline.errors import LoadError
from data_pipeline.loading.collate import MicroBatch
from tests.training.fakes import micro_batch


def loader(first: int, fails_at: int | None = None) -> Iterator[list[MicroBatch]]:
    for step in range(first, 100):
        if step == fails_at:
            raise LoadError(f"step {step} cannot be read")
        yield [micro_batch([2], step=step)]


def test_steps_come_in_order_with_their_own_batches_and_without_those_left_out() -> None:
    found = list(step_batches(loader(3), range(3, 8), {1, 4, 5}))
    assert [batches.step for batches in found] == [3, 6, 7]
    assert [batches.micro_batches[0].step for batches in found] == [3, 6, 7]
    assert all(batches.failure is None for batches in found)
    assert all(batches.data_wait >= 0 for batches in found)


def test_a_failure_waits_for_the_next_step_that_all_ranks_take() -> None:
    found = list(step_batches(loader(0, fails_at=2), range(6), {2, 3}))
    assert [(batches.step, str(batches.failure or "")) for batches in found] == [
        (0, ""), (1, ""), (4, "step 2 cannot be read"), (5, "step 2 cannot be read"),
    ]  # fmt: skip
    assert found[2].micro_batches == []


def test_no_step_asks_the_loader_for_nothing() -> None:
    assert list(step_batches([], range(5, 5), set())) == []
