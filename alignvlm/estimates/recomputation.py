"""The least recomputation that fits: which layers keep their activations and which compute them again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from alignvlm.config.deepspeed import read_strategy
from alignvlm.config.schema import Recipe, RecomputeConfig, StageConfig
from alignvlm.estimates.activations import Activations
from alignvlm.estimates.memory import estimate_memory, fullest_tiles
from alignvlm.estimates.steps import Volume
from alignvlm.model.flops import count_flops
from alignvlm.model.network import Network, largest_list

DEGREES = (0, 8, 6, 4, 3, 2, 1)
"""One layer in so many is tried, for each part; 0 is none."""


@dataclass(frozen=True)
class Recomputation:
    """A value of `train.gradient_checkpointing` and what it costs."""

    recompute: RecomputeConfig
    flops: float
    """What layers compute a second time, in all stages."""

    @property
    def overrides(self) -> str:
        """As it stands on a command line."""
        return " ".join(
            f"train.gradient_checkpointing.{part}={every}" for part, every in asdict(self.recompute).items()
        )


def least_recomputation(
    recipe: Recipe, network: Network, world_size: int, volumes: Sequence[Volume], available: float
) -> Recomputation | None:
    """The cheapest of all pairs of DEGREES with which every stage fits `available` bytes; None when none does.

    Args:
        volumes: of the recipe's stages, in order.
    """
    stages = list(recipe.stages.values())
    others = [_without_layers(recipe, stage, network, world_size) for stage in stages]
    whole = [
        count_flops(network, stage.trainable, RecomputeConfig(1, 1)).of(volume.work)
        for stage, volume in zip(stages, volumes, strict=True)
    ]
    tried = []
    for recompute in itertools.starmap(RecomputeConfig, itertools.product(DEGREES, DEGREES)):
        shares = {part: _share(network, part, every) for part, every in asdict(recompute).items()}
        flops = sum(share * stage[part].recomputed for part, share in shares.items() for stage in whole)
        tried.append(Recomputation(recompute, flops))
    for candidate in sorted(tried, key=lambda candidate: candidate.flops):  # of equal ones the first, with more zeros
        layers = (_layers(network, stage, candidate.recompute) for stage in stages)
        if all(other + size <= available for other, size in zip(others, layers, strict=True)):
            return candidate
    return None


def _without_layers(recipe: Recipe, stage: StageConfig, network: Network, world_size: int) -> float:
    """GPU memory of a stage in bytes, without what depends on the degree."""
    memory = estimate_memory(recipe, stage, network, read_strategy(stage), world_size)
    return memory.gpu_total - _layers(network, stage, recipe.train.recompute)


def _layers(network: Network, stage: StageConfig, recompute: RecomputeConfig) -> float:
    activations = Activations(network, recompute)
    vision = activations.vision(fullest_tiles(network, stage), network.parameters("vision", stage.trainable) > 0)
    return vision + activations.language(stage.micro_batch_packs * stage.sequence_length)


def _share(network: Network, part: str, every: int) -> float:
    """Of a part's layers, the share that recomputes."""
    num_layers = len(largest_list(network.part(part))[2])
    return -(-num_layers // every) / num_layers if every and num_layers else float(every > 0)
