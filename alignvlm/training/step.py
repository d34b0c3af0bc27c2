"""One optimizer step: the micro-batches of a global batch through the engine, the loss normalised over all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from alignvlm.training.distributed import World
from alignvlm.training.engine import Trainer
from alignvlm.training.optim import set_lr
from data_pipeline.errors import DataError, LoadError
from data_pipeline.loading.collate import MicroBatch


def train_step(
    trainer: Trainer,
    batches: Sequence[MicroBatch],
    world: World,
    factor: float,
    votes: Sequence[bool] = (),
    failure: LoadError | None = None,
) -> tuple[dict[str, Any], list[int]]:
    """Take one step with learning rates at `factor` of their peaks.

    The loss is the sum over supervised tokens divided by their number in the whole global batch: neither the number
    of ranks nor of micro-batches, nor how the tokens fall to them, enters. DeepSpeed divides gradients by ranks and
    micro-batches, so each loss is divided by tokens / (ranks x micro-batches).

    Args:
        votes: what this rank wants the others to know; counted over the ranks with the sum that the step needs anyway.
        failure: why this rank has no micro-batches; then all ranks stop before any of them computes.

    Returns:
        What happened, and the counted votes; both equal on all ranks.

    Raises:
        LoadError: on the ranks that have no micro-batches, DataError on the others.
    """
    began = time.perf_counter()
    lr = set_lr(trainer.engine.optimizer, trainer.groups, factor)
    filled = [b for b in batches if b.num_samples]
    failed, supervised, samples, tokens, tiles, attended, *counted = world.all_reduce_sum(
        failure is not None,
        sum(b.num_supervised for b in batches),
        sum(b.num_samples for b in filled),
        sum(b.input_ids.numel() for b in filled),
        sum(len(b.tiles) for b in filled),
        sum(float(b.cu_seqlens.diff().double().square().sum()) for b in filled),
        *map(float, votes),
    )
    if failure is not None:
        raise failure
    if failed:
        raise DataError(
            f"{failed:.0f} of {world.size} ranks could not load their data and say why; the same command goes on from "
            "the last checkpoint"
        )
    divisor = max(1.0, supervised) / (world.size * len(batches))
    losses = []
    for batch in batches:
        b = batch.to(world.device)
        output = trainer.engine(
            input_ids=b.input_ids,
            pixel_values=b.tiles,
            position_ids=b.position_ids,
            labels=b.labels,
            cu_seqlens=b.cu_seqlens,
            max_seqlen=b.max_seqlen,
            num_items_in_batch=divisor,
        )
        trainer.engine.backward(output.loss)
        trainer.engine.step()
        losses.append(output.loss.detach())
    (loss,) = world.all_reduce_sum(sum(float(x) for x in losses))
    result = {
        "epoch": batches[0].epoch,
        "loss": loss / (world.size * len(batches)),
        "lr": lr,
        "grad_norm": float(trainer.engine.get_global_grad_norm()),
        "tokens": int(tokens),
        "samples": int(samples),
        "supervised": int(supervised),
        "tiles": int(tiles),
        "attended": attended,
        "skipped": bool(trainer.engine.optimizer.overflow),
        "seconds": time.perf_counter() - began,
    }
    return result, [int(count) for count in counted]
