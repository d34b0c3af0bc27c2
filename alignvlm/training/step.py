"""One optimizer step: the micro-batches of a global batch through the engine, the loss normalised over all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from alignvlm.training.distributed import World
from alignvlm.training.engine import Trainer
from alignvlm.training.optim import set_lr
from data_pipeline.errors import DataError, LoadError, UnreachableError
from data_pipeline.loading.collate import MicroBatch
from data_pipeline.order.hashing import hash_key


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


class SourcePart(NamedTuple):
    """What one source had in the global batch."""

    tokens: int
    """Tokens that entered the language model, visual tokens included."""
    supervised: int
    """Tokens with a loss."""
    loss: float | None
    """Mean over the supervised tokens; None without any."""


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
    """What the global batch held."""
    votes: Votes
    """How many ranks gave each vote."""
    skipped: bool
    """The gradient was not finite, and DeepSpeed changed no weight."""
    seconds: float
    """Wall time, without waiting for data."""
    sources: dict[str, SourcePart] = field(default_factory=dict)
    """Source -> its part of the global batch."""
    shared: list[float] = field(default_factory=list)
    """What callbacks share, summed over the ranks."""


def train_step(
    trainer: Trainer,
    micro_batches: Sequence[MicroBatch],
    world: World,
    factor: float,
    votes: Votes,
    failure: LoadError | None = None,
    sources: Sequence[str] = (),
    shared: Sequence[float] = (),
) -> StepResult:
    """Take one step with learning rates at `factor` of their peaks.

    The host waits for the device once, at the end, to read the loss and the gradient norm; DeepSpeed waits there too,
    to see whether the gradient is finite.

    The loss is the sum over supervised tokens divided by their number in the whole global batch: neither the number
    of ranks nor of micro-batches, nor how the tokens fall to them, enters. DeepSpeed divides gradients by ranks and
    micro-batches, so each loss is divided by tokens / (ranks x micro-batches).

    Dropout is a function of the seed, the step and the micro-batch's number in the global batch: a resumed run draws
    what one without a stop draws, and so does another number of ranks that has the same micro-batches.

    Args:
        votes: of this rank.
        failure: why this rank has no micro-batches; then all ranks stop before any of them computes.
        sources: names of the mixture's sources in order, to tell their parts of the batch and of the loss; they cost
            no collective and no look at the device of their own.
        shared: further numbers to sum over the ranks with the counts.

    Raises:
        LoadError: on the ranks that have no micro-batches, DataError on the others.
    """
    began = time.perf_counter()
    lr = set_lr(trainer.engine.optimizer, trainer.groups, factor)
    parts = count_sources(micro_batches, len(sources))
    counts, votes, sums = agree(world, StepCounts.of(micro_batches), votes, failure, [*parts, *shared])
    parts, shared_sums = sums[: len(parts)], sums[len(parts) :]
    num_losses = world.size * len(micro_batches)
    divisor = max(1.0, counts.supervised) / num_losses
    total = torch.zeros(1 + len(sources), dtype=torch.float64, device=world.device)  # the loss, that of every source
    with trainer.same_weights():
        for number, micro_batch in enumerate(micro_batches):
            world.seed(hash_key(trainer.seed, micro_batch.step, number * world.size + world.rank))
            b = micro_batch.to(world.device)
            output = trainer.engine(**inputs_of(b), num_items_in_batch=divisor)
            trainer.engine.backward(output.loss)
            trainer.engine.step()
            total[0] += output.loss.detach()
            if sources:
                total[1:] += sums_by_source(output.token_losses, b.target_sources, len(sources))
    world.all_reduce(total)
    (loss, *source_sums), grad_norm = _read(total, trainer.engine.get_global_grad_norm())
    return StepResult(
        epoch=micro_batches[0].epoch,
        loss=loss / num_losses,
        lr=lr,
        grad_norm=grad_norm,
        counts=counts,
        votes=votes,
        skipped=bool(trainer.engine.optimizer.overflow),
        seconds=time.perf_counter() - began,
        sources={
            name: SourcePart(int(tokens), int(supervised), summed / supervised if supervised else None)
            for name, summed, tokens, supervised in zip(
                sources, source_sums, parts[: len(sources)], parts[len(sources) :], strict=True
            )
        },
        shared=shared_sums,
    )


def count_sources(micro_batches: Sequence[MicroBatch], num_sources: int) -> list[float]:
    """The tokens of every source in these micro-batches of one rank, then the supervised tokens of every source."""
    tokens, supervised = np.zeros(num_sources), np.zeros(num_sources)
    for b in micro_batches if num_sources else ():
        if b.num_samples:
            tokens += np.bincount(b.document_sources, weights=b.cu_seqlens.diff(), minlength=num_sources)
            supervised += np.bincount(b.target_sources, minlength=num_sources)
    return [*tokens.tolist(), *supervised.tolist()]


def sums_by_source(token_losses: torch.Tensor, target_sources: torch.Tensor, num_sources: int) -> torch.Tensor:
    """Summed losses float64 [S] of the targets [M] of every source, added in one order, and nothing is waited for."""
    numbers = torch.arange(num_sources, device=target_sources.device)
    return torch.where(target_sources == numbers[:, None], token_losses.double(), 0.0).sum(dim=1)


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


def _read(losses: torch.Tensor, grad_norm: torch.Tensor | float) -> tuple[list[float], float]:
    """Both as numbers of the host, by one copy from the device."""
    if not isinstance(grad_norm, torch.Tensor):
        return losses.tolist(), float(grad_norm)
    *first, last = torch.cat([losses, grad_norm.to(losses).reshape(1)]).tolist()
    return first, last


def agree(
    world: World, counts: StepCounts, votes: Votes, failure: LoadError | None = None, parts: Sequence[float] = ()
) -> tuple[StepCounts, Votes, list[float]]:
    """Counts, votes and other numbers summed over the ranks, by one collective; raises as `agreed_sums` does."""
    sums = agreed_sums(world, failure, *counts, *votes, *parts)
    end = len(counts) + len(votes)
    return StepCounts(*sums[: len(counts)]), Votes(*sums[len(counts) : end]), sums[end:]


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
