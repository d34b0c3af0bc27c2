"""One optimizer step: the micro-batches of a global batch through the engine, the loss normalised over all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from alignvlm.training.distributed import World
from alignvlm.training.engine import Trainer
from alignvlm.training.optim import set_lr
from data_pipeline.errors import DataError, LoadError, UnreachableError
from data_pipeline.loading.collate import MicroBatch


class StepCounts(NamedTuple):
    """What a batch holds; filler that stands for a micro-batch without documents is not counted."""

    supervised: float
    """Tokens with a loss."""
    samples: float
    """Documents."""
    tokens: float
    """Tokens that enter the language model, visual tokens included."""
    tiles: float
    attended: float
    """Sum over documents of their squared length."""

    @classmethod
    def of(cls, micro_batches: Sequence[MicroBatch]) -> StepCounts:
        """What these micro-batches of one rank hold."""
        filled = [b for b in micro_batches if b.num_samples]
        return cls(
            supervised=sum(b.num_supervised for b in micro_batches),
            samples=sum(b.num_samples for b in filled),
            tokens=sum(b.input_ids.numel() for b in filled),
            tiles=sum(len(b.tiles) for b in filled),
            attended=sum(float(b.cu_seqlens.diff().double().square().sum()) for b in filled),
        )


class Votes(NamedTuple):
    """What a rank tells the others with the sum that every step makes anyway; summed, how many ranks say so."""

    stop: float = 0
    """It got a signal: all ranks stop after this step."""
    written: float = 0
    """Its files of the pending checkpoint are written."""


@dataclass(frozen=True)
class StepResult:
    """What a step did. Equal on all ranks, except `seconds`."""

    epoch: int
    loss: float
    """Mean over the supervised tokens of the global batch."""
    lr: dict[str, float]
    """Learning rate by part of the model."""
    grad_norm: float
    counts: StepCounts
    """Of the global batch."""
    votes: Votes
    """Of all ranks."""
    skipped: bool
    """The gradient was not finite, and DeepSpeed changed no weight."""
    seconds: float
    """Wall time, without waiting for data."""


def train_step(
    trainer: Trainer,
    micro_batches: Sequence[MicroBatch],
    world: World,
    factor: float,
    votes: Votes,
    failure: LoadError | None = None,
) -> StepResult:
    """Take one step with learning rates at `factor` of their peaks.

    The host waits for the device once, at the end, to read the loss and the gradient norm; DeepSpeed waits there too,
    to see whether the gradient is finite.

    The loss is the sum over supervised tokens divided by their number in the whole global batch: neither the number
    of ranks nor of micro-batches, nor how the tokens fall to them, enters. DeepSpeed divides gradients by ranks and
    micro-batches, so each loss is divided by tokens / (ranks x micro-batches).

    Args:
        votes: of this rank.
        failure: why this rank has no micro-batches; then all ranks stop before any of them computes.

    Raises:
        LoadError: on the ranks that have no micro-batches, DataError on the others.
    """
    began = time.perf_counter()
    lr = set_lr(trainer.engine.optimizer, trainer.groups, factor)
    counts, votes = agree(world, StepCounts.of(micro_batches), votes, failure)
    num_losses = world.size * len(micro_batches)
    divisor = max(1.0, counts.supervised) / num_losses
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    with trainer.same_weights():
        for micro_batch in micro_batches:
            b = micro_batch.to(world.device)
            output = trainer.engine(**inputs_of(b), num_items_in_batch=divisor)
            trainer.engine.backward(output.loss)
            trainer.engine.step()
            total += output.loss.detach()
    world.all_reduce(total)
    loss, grad_norm = _read(total, trainer.engine.get_global_grad_norm())
    return StepResult(
        epoch=micro_batches[0].epoch,
        loss=loss / num_losses,
        lr=lr,
        grad_norm=grad_norm,
        counts=counts,
        votes=votes,
        skipped=bool(trainer.engine.optimizer.overflow),
        seconds=time.perf_counter() - began,
    )


def inputs_of(batch: MicroBatch) -> dict[str, Any]:
    """The model's arguments for a micro-batch on its device."""
    return {
        "input_ids": batch.input_ids,
        "pixel_values": batch.tiles,
        "position_ids": batch.position_ids,
        "cu_seqlens": batch.cu_seqlens,
        "max_seqlen": batch.max_seqlen,
        "visual_positions": batch.visual_positions,
        "target_positions": batch.target_positions,
        "targets": batch.targets,
    }


def _read(loss: torch.Tensor, grad_norm: torch.Tensor | float) -> tuple[float, float]:
    """Both as numbers of the host, by one copy from the device."""
    if not isinstance(grad_norm, torch.Tensor):
        return loss.item(), float(grad_norm)
    first, second = torch.stack([loss, grad_norm.to(loss)]).tolist()
    return first, second


def agree(world: World, counts: StepCounts, votes: Votes, failure: LoadError | None = None) -> tuple[StepCounts, Votes]:
    """Counts and votes summed over the ranks, by one collective; raises as `agreed_sums` does."""
    sums = agreed_sums(world, failure, *counts, *votes)
    return StepCounts(*sums[: len(counts)]), Votes(*sums[len(counts) :])


def agreed_sums(world: World, failure: LoadError | None, *values: float) -> list[float]:
    """Each value summed over the ranks, by one collective, unless a rank could not load its data.

    Raises:
        LoadError: this rank's `failure`.
        DataError: another rank could not load its data; UnreachableError where stores will be back.
    """
    passing = isinstance(failure, UnreachableError)
    failed, waiting, *sums = world.all_reduce_sum(failure is not None, passing, *values)
    if failure is not None:
        raise failure
    if failed:
        raise (UnreachableError if waiting == failed else DataError)(
            f"{failed:.0f} of {world.size} ranks could not load their data and say why; the same command resumes from "
            "the last checkpoint"
        )
    return sums
