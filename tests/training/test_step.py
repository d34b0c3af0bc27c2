"""One optimizer step: how the loss is normalised, what the ranks tell each other, what a failure does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from alignvlm.model.attention import SDPA
from alignvlm.training.step import StepCounts, Votes, agree, train_step
from data_pipeline.errors import DataError, LoadError, UnreachableError
from data_pipeline.loading.collate import collate
from tests.tiny import alone, samples, tiny_model
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
    assert agree(FakeWorld(), counts, votes, None, [7.0, 8.0]) == (counts, votes, [7.0, 8.0])


def test_loss_and_tokens_of_every_source_are_those_of_its_documents_computed_plainly() -> None:
    model, processor = tiny_model()
    model.model.language_model.set_attn_implementation(SDPA)
    model.double()
    encoded = [processor.encode(sample) for sample in samples()]
    packed = [([0, 1, 2], [1, 0, 1]), ([2, 0], [2, 0]), ([], [])]  # documents and their sources; the last is filler
    batches = [
        collate([encoded[i] for i in documents], ["s/0/k"] * len(documents), step=0, epoch=0, sources=sources)
        for documents, sources in packed
    ]
    trainer = fake_trainer()
    trainer.engine = ModelEngine(model)
    result = train_step(trainer, batches, FakeWorld(), 1.0, Votes(), None, ["a", "b", "c", "none"])

    model.model.language_model.set_attn_implementation("sdpa")
    sums, tokens, supervised = [0.0] * 4, [0] * 4, [0] * 4
    for documents, sources in packed:
        for i, source in zip(documents, sources, strict=True):
            inputs = alone(encoded[i])
            labels = inputs.pop("labels")[0, 1:]
            with torch.no_grad():
                logits = model(**inputs).logits[0, :-1]
            sums[source] += float(cross_entropy(logits, labels, reduction="sum"))
            tokens[source] += inputs["input_ids"].numel()
            supervised[source] += int((labels != -100).sum())
    assert list(result.sources) == ["a", "b", "c", "none"]
    for number, (name, part) in enumerate(result.sources.items()):
        assert (part.tokens, part.supervised) == (tokens[number], supervised[number])
        assert part.loss == (None if name == "none" else pytest.approx(sums[number] / supervised[number], rel=1e-9))
    assert result.loss == pytest.approx(sum(sums) / sum(supervised), rel=1e-9)


class ModelEngine:
    """The parts of DeepSpeed's engine that a step calls, around a model."""

    def __init__(self, model: Any) -> None:
        self.model, self.optimizer = model, SimpleNamespace(param_groups=[{"lr": 0.0}], overflow=False)

    def __call__(self, **inputs: Any) -> Any:
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None: ...

    def get_global_grad_norm(self) -> torch.Tensor:
        return torch.ones(())
