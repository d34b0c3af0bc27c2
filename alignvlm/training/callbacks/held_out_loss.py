"""The loss on held-out data while a stage trains: forward passes, after which everything is as it was before."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from alignvlm import stage_data
from alignvlm.config.names import HELD_OUT, LOSS
from alignvlm.errors import UserError
from alignvlm.stage_data import HeldOutPacks
from alignvlm.training.callbacks.base import Callback, StageState
from alignvlm.training.record import StepRecord
from alignvlm.training.step import agreed_sums, inputs_of
from data_pipeline.errors import LoadError
from data_pipeline.loading.ledger import Ledger


class HeldOutLoss(Callback):
    """Adds `loss/<source>` and `loss/held_out` to the scores and the record every so many steps and after the last one.

    Each is the mean cross entropy per supervised token, in nats: of the packs of one source, and of all packs.
    """

    def __init__(self) -> None:
        self._packs: HeldOutPacks | None = None

    def on_start(self, state: StageState) -> None:
        wanted = state.recipe.evaluation.loss is not None and not state.is_last_step
        self._packs = load(state) if wanted else None

    def on_step(self, state: StageState, record: StepRecord) -> None:
        loss = state.recipe.evaluation.loss
        if self._packs is None or loss is None or state.discard:
            return
        if state.step % loss.every_steps == 0 or state.is_last_step:
            began = time.perf_counter()
            with state.timeline.during("evaluation"):
                state.scores |= measure(state, self._packs)
            record.extra |= state.scores
            record.extra["held_out_seconds"] = time.perf_counter() - began


def load(state: StageState) -> HeldOutPacks:
    """This rank's held-out packs of the stage; every rank calls it.

    Raises:
        UserError: the packs of a source have nothing to predict. LoadError, DataError: this rank or another one could
            not read its packs.
    """
    recipe, world = state.recipe, state.world
    ledger = Ledger(state.run.folder.quarantine, recipe.data.max_bad_fraction)
    packs, failure = HeldOutPacks([], []), None
    try:
        packs = stage_data.held_out_packs(
            recipe, state.stage, state.processor, rank=world.rank, world_size=world.size, ledger=ledger
        )
    except LoadError as error:
        failure = error
    mine = packs.source_of[world.rank :: world.size]
    counts = [
        sum(b.num_supervised for b, name in zip(packs.mine, mine, strict=False) if name == each)
        for each in recipe.evaluation.held_out
    ]
    for name, count in zip(recipe.evaluation.held_out, agreed_sums(world, failure, *counts), strict=True):
        if not count:
            raise UserError(
                f"evaluation.loss.sources: the packs of {name!r} have no supervised token and so no loss; leave it out"
            )
    return packs


def measure(state: StageState, packs: HeldOutPacks) -> dict[str, float]:
    """`loss/<source>` and `loss/held_out`, equal on all ranks, bit for bit the same for any number of them.

    A pack is computed alone, by whichever rank, and packs are added in their order. All ranks make as many forward
    passes. Neither gradients, optimizer nor random numbers take part.
    """
    trainer, world = state.trainer, state.world
    num_packs = len(packs.source_of)
    rounds = len(packs.mine)
    totals = torch.zeros(2, rounds * world.size, dtype=torch.float64, device=world.device)  # loss and tokens by pack
    trainer.engine.eval()
    try:
        with torch.no_grad(), trainer.same_weights():
            for number, batch in enumerate(packs.mine):
                output = trainer.engine(**inputs_of(batch.to(world.device)), num_items_in_batch=1)
                totals[0, world.rank + number * world.size] = output.loss
                totals[1, world.rank + number * world.size] = batch.num_supervised
                world.beat()
    finally:
        trainer.engine.train()
    world.all_reduce(totals)
    losses, tokens = totals[:, :num_packs].tolist()
    return means(packs.source_of, losses, tokens)


def means(source_of: Sequence[str], losses: Sequence[float], tokens: Sequence[float]) -> dict[str, float]:
    """The scores: mean loss per token of every source and of all of them, from the sums of every pack."""
    members = {HELD_OUT: range(len(source_of))} | {
        f"{LOSS}{name}": [number for number, each in enumerate(source_of) if each == name]
        for name in dict.fromkeys(source_of)
    }
    return {
        name: sum(losses[number] for number in numbers) / sum(tokens[number] for number in numbers)
        for name, numbers in members.items()
    }
