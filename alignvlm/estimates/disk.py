"""What a stage takes of the disk that holds the run's folder. Sizes in bytes, of all ranks together; upper estimates.

A checkpoint holds 12 bytes per parameter that learns (the fp32 master and AdamW's two moments), and in the training's
precision all weights under ZeRO-1 and 2, those that are frozen under ZeRO-3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignvlm.config.schema import CheckpointConfig, Recipe, StageConfig
from alignvlm.model.lora import adapted_weights
from alignvlm.model.network import Network


@dataclass(frozen=True)
class Disk:
    """Bytes of a stage's files."""

    checkpoint: float
    """Bytes of one checkpoint."""
    num_checkpoints: int
    """Checkpoints on disk at once: the last ones, the best, those kept for good, and the one being written."""
    export: float
    masters: float
    """fp32 masters for the next stage, which go when that is exported; 0 in fp32 and after the last stage."""

    @property
    def total(self) -> float:
        return self.checkpoint * self.num_checkpoints + self.export + self.masters


def estimate_disk(
    recipe: Recipe, stage: StageConfig, network: Network, strategy: Mapping[str, Any], steps: int
) -> Disk:
    """The disk of a stage of so many steps; `strategy` is the parsed DeepSpeed file."""
    bytes_each = 2 if recipe.train.precision == "bf16" else 4
    trained = network.of_stage(stage)
    everything, learns = trained.total(), trained.total(stage.trained)
    adapters = everything - network.total()
    zero_stage = strategy.get("zero_optimization", {}).get("stage", 0)
    so_far = list(recipe.stages.values())[: stage.number]
    changed = [glob for each in so_far for glob in (*each.trainable, *adapted_weights(network.model, each))]
    hands_on = recipe.train.precision == "bf16" and stage.number < len(recipe.stages)
    return Disk(
        checkpoint=checkpoint_bytes(learns, everything - learns, zero_stage, bytes_each),
        num_checkpoints=num_checkpoints(recipe.checkpoint, steps),
        export=float(network.total() * bytes_each + adapters * 4),  # merged, and the adapters once more
        masters=4.0 * network.total(changed) if hands_on else 0.0,
    )


def checkpoint_bytes(learns: float, frozen: float, zero_stage: int, bytes_each: int) -> float:
    """One checkpoint with so many parameters that learn and that do not, in a training of `bytes_each` per weight."""
    return 12 * learns + bytes_each * (frozen if zero_stage == 3 else learns + frozen)


def staged_bytes(learns: float, frozen: float, zero_stage: int, bytes_each: int, world_size: int, ranks: int) -> float:
    """What the first `ranks` of `world_size` ranks copy of a checkpoint to host memory, each its own part.

    Rank 0 copies all weights where ZeRO does not partition them, and without ZeRO everything.
    """
    everything = checkpoint_bytes(learns, frozen, zero_stage, bytes_each)
    of_rank_0 = {0: everything, 3: 0.0}.get(zero_stage, everything - 12 * learns)
    return of_rank_0 + (everything - of_rank_0) * ranks / world_size


def num_checkpoints(settings: CheckpointConfig, steps: int) -> int:
    """The most that a stage of so many steps has at once."""
    kept = settings.keep_last + 1 + (settings.keep_best is not None)
    if settings.keep_every is not None:
        kept += steps // math.lcm(settings.keep_every, settings.every_steps)
    return min(kept, steps)
