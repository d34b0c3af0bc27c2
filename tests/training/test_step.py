"""One optimizer step: how the loss is normalised, what the ranks tell each other, what a failure does."""

from __future__ import annotations

import pytest

from alignvlm.training.step import StepCounts, Votes, agree, train_step
from data_pipeline.errors import DataError, LoadError, UnreachableError
from tests.training.fakes import FakeWorld, fake_trainer, micro_batch


def test_the_loss_is_the_mean_over_supervised_tokens_however_they_fall_to_micro_batches() -> None:
    batches = [micro_batch([3, 5], supervised=6, tiles=2), micro_batch([4], supervised=2)]
    trainer = fake_trainer(12.0, 6.0)
    result = train_step(trainer, batches, FakeWorld(), 0.5, Votes())
    assert result.loss == (12 + 6) / (6 + 2)
    assert sum(trainer.engine.backwards) / len(batches) == result.loss  # DeepSpeed divides by the micro-batches
    assert result.lr == {"connector": 0.25}
    assert trainer.engine.optimizer.param_groups[0]["lr"] == 0.25
    assert result.counts == StepCounts(supervised=8, samples=3, tokens=12, tiles=2, attended=9 + 25 + 16)
    assert (result.epoch, result.grad_norm, result.skipped) == (1, 2.5, False)


def test_tokens_of_all_ranks_divide_the_loss() -> None:
    counts = StepCounts(supervised=12, samples=1, tokens=20, tiles=0, attended=400)
    world = FakeWorld(size=2, others=[0, 0, *counts, *Votes(stop=1)])
    trainer = fake_trainer(10.0)
    result = train_step(trainer, [micro_batch([8], supervised=4)], world, 1.0, Votes(written=True))
    assert trainer.engine.divisors == [(4 + 12) / 2]  # DeepSpeed averages over the ranks
    assert result.counts == StepCounts(supervised=16, samples=2, tokens=28, tiles=0, attended=464)
    assert result.votes == Votes(stop=1, written=1)
    assert (len(world.sums), len(world.reduced)) == (1, 1)  # before the micro-batches, and the loss


def test_filler_is_not_counted_and_a_step_without_supervised_tokens_divides_by_one() -> None:
    trainer = fake_trainer(0.0)
    result = train_step(trainer, [micro_batch([])], FakeWorld(), 1.0, Votes())
    assert result.counts == StepCounts(0, 0, 0, 0, 0)
    assert trainer.engine.divisors == [1.0]


def test_a_step_that_deepspeed_skips_says_so() -> None:
    trainer = fake_trainer(float("nan"), overflow=True)
    assert train_step(trainer, [micro_batch([2], supervised=1)], FakeWorld(), 1.0, Votes()).skipped


def test_a_failure_is_raised_here_after_the_others_know_of_it() -> None:
    world, trainer = FakeWorld(size=2), fake_trainer()
    with pytest.raises(LoadError, match="the disk is gone"):
        train_step(trainer, [], world, 1.0, Votes(), LoadError("the disk is gone"))
    assert world.sums[0][0] == 1
    assert trainer.engine.calls == 0


@pytest.mark.parametrize(("waiting", "error"), [(1, DataError), (2, UnreachableError)])
def test_a_failure_of_another_rank_stops_this_one_before_it_computes(waiting: int, error: type[DataError]) -> None:
    trainer = fake_trainer(1.0)
    world = FakeWorld(size=3, others=[2, waiting, *StepCounts(0, 0, 0, 0, 0), *Votes()])
    with pytest.raises(DataError, match="2 of 3 ranks could not load their data") as raised:
        train_step(trainer, [micro_batch([2], supervised=1)], world, 1.0, Votes())
    assert raised.type is error
    assert trainer.engine.calls == 0


def test_counts_and_votes_come_back_under_their_names() -> None:
    counts, votes = StepCounts(1, 2, 3, 4, 5), Votes(stop=6, written=7)
    assert agree(FakeWorld(), counts, votes) == (counts, votes)
