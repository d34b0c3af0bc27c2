"""The least recomputation that fits: which layers keep their activations and which compute them again."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from alignvlm.config.deepspeed import read_strategy
from alignvlm.config.schema import Recipe, RecomputeConfig, StageConfig
from alignvlm.estimates.memory import fullest_work, stage_memory
from alignvlm.model.flops import Work, count_flops
from alignvlm.model.network import Network, largest_list

DEGREES = (0, 8, 6, 4, 3, 2, 1)
"""One layer in so many is tried, for each part; 0 is none."""


@dataclass(frozen=True)
class Recomputation:
    """A value of `train.gradient_checkpointing` and what it costs."""

    recompute: RecomputeConfig
    flops: float
    """What layers compute a second time."""

    @property
    def overrides(self) -> str:
        """The setting as it is written on a command line."""
        return " ".join(
            f"train.gradient_checkpointing.{part}={every}" for part, every in asdict(self.recompute).items()
        )


def least_recomputation(
    recipe: Recipe,
    network: Network,
    world_size: int,
    available: float,
    works: Sequence[tuple[StageConfig, Work]],
) -> Recomputation | None:
    """The cheapest of all pairs of DEGREES with which every stage fits `available` bytes; None when none does.

    Args:
        works: stages and what each of them computes.
    """
    memories = [stage_memory(recipe, stage, network, read_strategy(stage), world_size) for stage, _ in works]
    whole = [
        count_flops(network.of_stage(stage), stage.trained, RecomputeConfig(1, 1)).of(work) for stage, work in works
    ]
    tried = []
    for recompute in itertools.starmap(RecomputeConfig, itertools.product(DEGREES, DEGREES)):
        shares = {part: _share(network, part, every) for part, every in asdict(recompute).items()}
        flops = sum(share * stage[part].recomputed for part, share in shares.items() for stage in whole)
        tried.append(Recomputation(recompute, flops))
    for candidate in sorted(tried, key=lambda candidate: candidate.flops):  # of equal ones the first, with more zeros
        if all(memory.of(candidate.recompute).gpu_total <= available for memory in memories):
            return candidate
    return None


def automatic(
    recipe: Recipe, stage: StageConfig, network: Network, world_size: int, available: float
) -> RecomputeConfig | None:
    """What `train.gradient_checkpointing: auto` takes in a stage: the least that fits its fullest micro-batch."""
    least = least_recomputation(recipe, network, world_size, available, [(stage, fullest_work(network, stage))])
    return None if least is None else least.recompute


def _share(network: Network, part: str, every: int) -> float:
    """The share of a part's layers that recompute their activations."""
    num_layers = len(largest_list(network.part(part))[2])
    return -(-num_layers // every) / num_layers if every and num_layers else float(every > 0)
