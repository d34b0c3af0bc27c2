"""The packs of a stage's held-out loss: which, and those that this rank computes, read once and kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from alignvlm.stage_data.plan import stage_plan
from alignvlm.stage_data.processor import stage_encoder

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe, StageConfig
    from alignvlm.model import AlignVLMProcessor
    from data_pipeline.loading.collate import MicroBatch
    from data_pipeline.loading.ledger import Ledger

ORDER = "held-out"
"""Instead of a stage's name it seeds the order: all stages with packs of one length measure the same packs."""


@dataclass(frozen=True)
class HeldOutPacks:
    """Packs of one source each, dealt to the ranks in turn: pack n is that of rank n % ranks."""

    source_of: list[str]
    """The source of every pack."""
    mine: list[MicroBatch]
    """This rank's packs in order, one per micro-batch; all ranks have as many, some a last one without documents."""


def held_out_packs(
    recipe: Recipe,
    stage: StageConfig,
    processor: AlignVLMProcessor,
    *,
    rank: int = 0,
    world_size: int = 1,
    ledger: Ledger | None = None,
) -> HeldOutPacks:
    """The first packs of every source of `evaluation.loss`, planned as the stage's own are, on any number of ranks.

    Raises:
        DataError: a source has no sample that fits, or its lengths are missing; LoadError: it cannot be read.
    """
    import numpy as np

    from data_pipeline.loading.loader import load_packs
    from data_pipeline.order.batch import Packs

    loss = recipe.evaluation.loss
    assert loss is not None, "a recipe without held-out loss has no held-out packs"
    parts: list[Packs] = []
    source_of: list[str] = []
    sources: dict[str, Any] = {}
    for number, name in enumerate(loss.sources):
        alone = replace(
            stage, name=ORDER, mixture={name: 1.0}, global_batch_packs=loss.max_packs, epochs=1, max_steps=1
        )
        plan = stage_plan(recipe, alone, processor)
        packs = next(plan.batches()).packs
        filled = packs.take(np.flatnonzero(np.diff(packs.offsets)))
        parts.append(replace(filled, source=np.full_like(filled.source, number)))
        source_of += [name] * len(filled)
        sources |= plan.sources
    rounds = -(-len(source_of) // world_size)
    mine = load_packs(
        Packs.join(parts),
        rank + world_size * np.arange(rounds),  # numbers behind the last pack are empty ones
        sources,
        stage_encoder(stage, processor),
        num_workers=recipe.data.num_workers,
        ledger=ledger,
    )
    return HeldOutPacks(source_of, mine)
