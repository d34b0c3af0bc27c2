"""The whole estimate of a run: parameters, steps, FLOPs, hours, memory, and what to change if it does not fit."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from alignvlm.config.deepspeed import accumulation_steps, check_partition_groups, read_strategy
from alignvlm.config.schema import PARTS, Recipe, RecomputeConfig, StageConfig
from alignvlm.connectors.vocabulary import VocabularyConnector
from alignvlm.errors import UserError
from alignvlm.estimates.disk import Disk, estimate_disk, staged_bytes
from alignvlm.estimates.memory import GIB, HEADROOM, Memory, estimate_memory, naive_vocabulary_bytes
from alignvlm.estimates.recomputation import Recomputation, automatic, least_recomputation
from alignvlm.estimates.savings import changed_recipes
from alignvlm.estimates.steps import Volume, stage_volume
from alignvlm.kernels.fused_costs import fuse_on_meta
from alignvlm.kernels.fused_layers import find_layers, takes_fused_layers
from alignvlm.model.flops import PartFlops, count_flops
from alignvlm.model.network import Network, build_network


@dataclass(frozen=True)
class Fit:
    """Whether the memory suffices, and the setting that mends it."""

    fits: bool
    available: float
    """Bytes that a run may use."""
    fix: str | None = None
    """Overrides after which it fits; None when it does, or when none of ours is enough."""


@dataclass(frozen=True)
class StageEstimate:
    """One stage."""

    name: str
    strategy: str
    trainable: dict[str, int]
    """Part -> parameters that learn."""
    volume: Volume
    samples_per_step: float
    accumulation: int | None
    """Micro-batches per rank and step; None when the global batch cannot be shared evenly."""
    flops: dict[str, PartFlops]
    hours: float
    """Duration at the stated utilisation, if all ranks were busy all the time."""
    recompute: RecomputeConfig
    memory: Memory
    fit: Fit
    disk: Disk
    host: dict[str, float]
    """Bytes by kind in the memory of rank 0's host: what is offloaded to it, and the copy of a checkpoint from which
    its ranks write, page-locked beside GPUs. Loader processes and libraries come on top."""
    lower: tuple[str, float] | None
    """(strategy below ZeRO-3 under which the stage fits as it is, its bytes per GPU); None where there is none."""
    naive_vocabulary: float
    """Bytes of one N x V tensor of ALIGN's plain form for the fullest micro-batch; 0 for other connectors."""
    our_vocabulary: float
    """Bytes of the block that the operator holds instead."""
    problems: list[str]

    @property
    def total_flops(self) -> float:
        return sum(part.model for part in self.flops.values())


@dataclass(frozen=True)
class RunEstimate:
    """A recipe on so many GPUs."""

    recipe: str
    world_size: int
    gpus_per_node: int
    gpu_memory: float
    mfu: float
    peak_tflops: float
    parameters: dict[str, int]
    """Part -> parameters, tied ones counted once."""
    connector: str
    w2_parameters: int
    """Parameters of ALIGN's vocabulary projection W2; 0 for other connectors."""
    tokens_per_tile: int
    max_tokens_per_image: int
    fused_layers: dict[str, dict[str, int]]
    """Kind of layer -> classes and numbers of those that Liger's kernels can compute."""
    recompute: RecomputeConfig | None
    """What the recipe says; None where each stage takes the least that fits it."""
    least_recomputation: Recomputation | None
    """The least with which every stage fits; None when more than recomputation is needed."""
    stages: list[StageEstimate]

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def disk(self) -> float:
        """Bytes of the run's folder at most: what all stages leave, and the initial model, as large as an export."""
        return self.stages[0].disk.export + sum(stage.disk.total for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether every stage can run as it is."""
        return not any(stage.problems for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, totals included, for `--json`."""
        result = dataclasses.asdict(self) | {"hours": self.hours, "fits": self.fits, "disk": self.disk}
        for stage, data in zip(self.stages, result["stages"], strict=True):
            data["total_flops"] = stage.total_flops
            data["disk"]["total"] = stage.disk.total
            data["memory"] |= {"gpu_total": stage.memory.gpu_total, "host_total": stage.memory.host_total}
        return result


def estimate_run(
    recipe: Recipe,
    world_size: int,
    *,
    gpus_per_node: int = 8,
    gpu_memory: float = 80.0,
    mfu: float = 0.4,
    peak_tflops: float = 989.0,
) -> RunEstimate:
    """Estimate a recipe.

    Args:
        gpus_per_node: of which a smaller world uses fewer.
        gpu_memory: GiB of one GPU. mfu: model FLOPs utilisation, 0 to 1.
        peak_tflops: dense bf16 peak of one GPU (H100 SXM: 989).

    Raises:
        UserError: for arguments out of range, unknown shapes, or an unknown strategy. What merely does not fit is
            reported in `StageEstimate.problems`.
    """
    if min(world_size, gpus_per_node) < 1 or gpu_memory <= 0 or peak_tflops <= 0 or not 0 < mfu <= 1:
        raise UserError(
            "estimate: --world-size, --gpus-per-node, --gpu-memory and --peak-tflops must be positive, --mfu between 0 "
            "and 1"
        )
    gpus_per_node = min(gpus_per_node, world_size)
    network = build_network(recipe)
    if takes_fused_layers(recipe.model.fused_layers):
        fuse_on_meta(network.model)
    dims, w2 = network.dims, _vocabulary_projection(network)
    rate = world_size * peak_tflops * 1e12 * mfu
    available = gpu_memory * GIB * HEADROOM
    volumes = [stage_volume(recipe, stage, dims, world_size) for stage in recipe.stages.values()]
    works = [(stage, volume.work) for stage, volume in zip(recipe.stages.values(), volumes, strict=True)]
    least = least_recomputation(recipe, network, world_size, available, works)
    stages = [
        _estimate_stage(recipe, stage, network, world_size, gpus_per_node, volume, available, rate, least)
        for stage, volume in zip(recipe.stages.values(), volumes, strict=True)
    ]
    return RunEstimate(
        recipe=recipe.name,
        world_size=world_size,
        gpus_per_node=gpus_per_node,
        gpu_memory=gpu_memory,
        mfu=mfu,
        peak_tflops=peak_tflops,
        parameters={part: network.parameters(part) for part in PARTS},
        connector=network.connector.options.kind,
        w2_parameters=0 if w2 is None else w2.numel(),
        tokens_per_tile=dims.tokens_per_tile,
        max_tokens_per_image=_largest_image(recipe) * dims.tokens_per_tile,
        fused_layers={
            kind: dict(Counter(type(module).__name__ for module in modules))
            for kind, modules in find_layers(network.model).items()
        },
        recompute=None if recipe.train.gradient_checkpointing == "auto" else recipe.train.recompute,
        least_recomputation=least,
        stages=stages,
    )


def _estimate_stage(
    recipe: Recipe,
    stage: StageConfig,
    network: Network,
    world_size: int,
    gpus_per_node: int,
    volume: Volume,
    available: float,
    rate: float,
    least: Recomputation | None,
) -> StageEstimate:
    dims, trained = network.dims, network.of_stage(stage)
    strategy = read_strategy(stage)
    if recipe.train.gradient_checkpointing == "auto":
        recompute = automatic(recipe, stage, network, world_size, available) or RecomputeConfig(1, 1)
        recipe = replace(recipe, train=replace(recipe.train, gradient_checkpointing=recompute))
    problems: list[str] = []
    accumulation: int | None = None
    try:
        check_partition_groups(stage, strategy, world_size)
        accumulation = accumulation_steps(stage, world_size)
    except UserError as error:
        problems.append(str(error))
    flops = count_flops(trained, stage.trained, recipe.train.recompute).of(volume.work)
    memory = estimate_memory(recipe, stage, network, strategy, world_size)
    fit = _fit(recipe, stage, network, world_size, available, memory, least)
    if not fit.fits:
        way_out = f"set {fit.fix}" if fit.fix else "use more or larger GPUs, or a smaller model"
        needed = f"{memory.gpu_total / GIB:.1f} GiB of {fit.available / GIB:.1f} GiB usable"
        problems.append(f"stages.{stage.name} needs {needed} per GPU; {way_out}")
    if dims.tokens_per_tile >= stage.sequence_length:
        problems.append(
            f"stages.{stage.name}.sequence_length is {stage.sequence_length}, but one tile alone takes "
            f"{dims.tokens_per_tile} tokens: set it to more than {_largest_image(recipe) * dims.tokens_per_tile}"
        )
    visual = stage.micro_batch_packs * stage.sequence_length // dims.tokens_per_tile * dims.tokens_per_tile
    w2 = _vocabulary_projection(network)
    naive, ours = (0.0, 0.0) if w2 is None else naive_vocabulary_bytes(w2, visual)
    return StageEstimate(
        name=stage.name,
        strategy=stage.deepspeed,
        trainable={part: trained.parameters(part, stage.trained) for part in PARTS},
        volume=volume,
        samples_per_step=volume.samples / volume.steps,
        accumulation=accumulation,
        flops=flops,
        hours=sum(part.model for part in flops.values()) / rate / 3600,
        recompute=recipe.train.recompute,
        memory=memory,
        fit=fit,
        disk=estimate_disk(recipe, stage, network, strategy, volume.steps),
        host=_host(trained, stage, strategy, world_size, gpus_per_node, memory),
        lower=_lower_strategy(recipe, stage, network, world_size, available, accumulation),
        naive_vocabulary=naive,
        our_vocabulary=ours,
        problems=problems,
    )


def _host(
    trained: Network,
    stage: StageConfig,
    strategy: Mapping[str, Any],
    world_size: int,
    gpus_per_node: int,
    memory: Memory,
) -> dict[str, float]:
    learns = trained.total(stage.trained)
    staged = staged_bytes(
        learns, trained.total() - learns, strategy.get("zero_optimization", {}).get("stage", 0),
        trained.model.dtype.itemsize, world_size, gpus_per_node,
    )  # fmt: skip
    offloaded = {"offloaded": memory.host_total * gpus_per_node} if memory.host else {}
    return offloaded | {"copy of a checkpoint": staged}


def _vocabulary_projection(network: Network) -> torch.Tensor | None:
    """The rows [V, d] that a connector's logits over a vocabulary come from."""
    connector = network.connector
    return connector.logit_rows if isinstance(connector, VocabularyConnector) else None


def _largest_image(recipe: Recipe) -> int:
    """Tiles of the largest image."""
    tiles = recipe.model.tiles
    return tiles.max_tiles + int(tiles.overview and tiles.max_tiles > 1)


def _lower_strategy(
    recipe: Recipe, stage: StageConfig, network: Network, world_size: int, available: float, accumulation: int | None
) -> tuple[str, float] | None:
    """The lowest ZeRO stage that fits where the recipe takes ZeRO-3 without offloading: it asks least of the host.

    ZeRO-1 only where its sums of micro-batches are as exact: in fp32, or of one micro-batch.
    """
    zero = read_strategy(stage).get("zero_optimization", {})
    if zero.get("stage") != 3 or "offload_param" in zero or "offload_optimizer" in zero:
        return None
    is_exact = recipe.train.precision == "fp32" or accumulation == 1
    for name in [*(["zero1"] if is_exact else []), "zero2"]:
        strategy = read_strategy(replace(stage, deepspeed=name))
        needed = estimate_memory(recipe, stage, network, strategy, world_size).gpu_total
        if needed <= available:
            return name, needed
    return None


def _fit(
    recipe: Recipe,
    stage: StageConfig,
    network: Network,
    world_size: int,
    available: float,
    memory: Memory,
    least: Recomputation | None,
) -> Fit:
    if memory.gpu_total <= available:
        return Fit(True, available)
    if least is not None:
        return Fit(False, available, least.overrides)
    for overrides, changed, changed_stage in changed_recipes(recipe, stage):
        strategy = read_strategy(changed_stage)
        if estimate_memory(changed, changed_stage, network, strategy, world_size).gpu_total <= available:
            return Fit(False, available, " ".join(overrides))
    return Fit(False, available)
