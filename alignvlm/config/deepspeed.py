"""The one place where a file of ds_configs/ meets a recipe.

The file says how to shard; every number of the training (batch sizes, precision, clipping, optimizer) comes from the
recipe, so that no two places state the same one.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignvlm.config.schema import Recipe, StageConfig
from alignvlm.errors import UserError, shown
from alignvlm.resources import resource
from data_pipeline.errors import DataError, nearest
from data_pipeline.order.batch import accumulation_steps as steps_of_packs

OWNED_BY_RECIPE: dict[str, str] = {
    "train_batch_size": "stages.*.global_batch_packs",
    "train_micro_batch_size_per_gpu": "stages.*.micro_batch_packs",
    "gradient_accumulation_steps": "stages.*.global_batch_packs",
    "gradient_clipping": "stages.*.max_grad_norm",
    "scheduler": "stages.*.schedule",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "steps_per_print": "tracking.interval",
    "wall_clock_breakdown": "tracking.interval",
}
"""Top-level DeepSpeed key -> the recipe's key that decides it."""

OPTIMIZER_OWNED_BY_RECIPE: dict[str, str] = {
    "lr": "stages.*.lr",
    "betas": "stages.*.betas",
    "weight_decay": "stages.*.weight_decay",
}

NEVER = 10**9
DEFAULT_BUCKET = 500_000_000
"""DeepSpeed's own, in elements."""


def list_deepspeed_configs() -> list[str]:
    """Names that `train.deepspeed` may take."""
    return sorted(path.stem for path in resource("ds_configs").glob("*.json"))


def is_strategy_file(name_or_path: str) -> bool:
    """Whether this is the path of a user's own strategy rather than the name of one of ours."""
    return name_or_path.endswith(".json") or "/" in name_or_path


def find_deepspeed_config(name_or_path: str) -> Path:
    """Path of a strategy given by name ("zero3") or by path ("my/zero.json")."""
    if is_strategy_file(name_or_path):
        path = Path(os.path.expanduser(name_or_path))
        if not os.path.isfile(path):
            names = ", ".join(list_deepspeed_configs())
            raise UserError(f"deepspeed: the file {shown(name_or_path)} does not exist; by name: {names}")
        return path
    path = resource("ds_configs", f"{name_or_path}.json")
    if not os.path.isfile(path):
        hint = nearest(name_or_path, list_deepspeed_configs())
        raise UserError(f"deepspeed: unknown strategy {shown(name_or_path)}: {hint}")
    return path


def read_strategy(stage: StageConfig) -> dict[str, Any]:
    """The strategy file of a stage, checked to state nothing that the recipe states."""
    path = find_deepspeed_config(stage.deepspeed)
    try:
        strategy = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(strategy, dict):
        raise UserError(f"{path}: a DeepSpeed configuration is a JSON object")
    for section in ("zero_optimization", "optimizer"):
        if not isinstance(strategy.get(section, {}), dict):
            raise UserError(f"{path}: {section} is {shown(strategy[section])}, but must be a JSON object")
    if zero := strategy.get("zero_optimization"):  # DeepSpeed leaves "auto" out and takes its default
        strategy["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}
    for key, owner in OWNED_BY_RECIPE.items():
        if key in strategy:
            raise UserError(f"{path}: remove {key!r}: the recipe's {owner} decides it")
    if strategy.get("zero_optimization", {}).get("zero_quantized_gradients"):
        raise UserError(
            f"{path}: remove 'zero_optimization.zero_quantized_gradients': DeepSpeed's kernel takes the bits of bf16 "
            "and fp32 gradients for fp16, and its result is noise"
        )
    optimizer = strategy.get("optimizer", {"type": "AdamW"})
    if optimizer.get("type") != "AdamW":
        raise UserError(f"{path}: optimizer.type is {optimizer.get('type')!r}, but must be 'AdamW'")
    for key, owner in OPTIMIZER_OWNED_BY_RECIPE.items():
        if key in optimizer.get("params", {}):
            raise UserError(f"{path}: remove 'optimizer.params.{key}': the recipe's {owner} decides it")
    return strategy


def experimental_settings(strategy: Mapping[str, Any]) -> list[str]:
    """What a strategy file asks for that has never run with alignvlm, in words."""
    zero = strategy.get("zero_optimization", {})
    found = []
    if zero.get("zero_hpz_partition_size", 1) > 1:
        found.append("a second partition of the weights in each node has never run with alignvlm")
    if zero.get("zero_quantized_weights") or zero.get("zero_quantized_nontrainable_weights"):
        found.append(
            "quantised weights have never run with alignvlm, and nvcc compiles their kernel at the first start"
        )
    return found


def accumulation_steps(stage: StageConfig, world_size: int) -> int:
    """Micro-batches per rank and optimizer step; UserError naming values that fit when they do not divide."""
    try:
        return steps_of_packs(stage.global_batch_packs, world_size, stage.micro_batch_packs)
    except DataError as error:
        raise UserError(f"stages.{stage.name}.{error}") from error


def deepspeed_config(
    recipe: Recipe, stage: StageConfig, world_size: int, *, cuda: bool | None = None
) -> dict[str, Any]:
    """DeepSpeed's configuration for one stage.

    Batch sizes count packs. Learning rates and weight decay are not in it: they come with the parameter groups.
    `gradient_clipping` is always stated, because DeepSpeed's default is not "off". The optimizer is PyTorch's fused
    AdamW, because DeepSpeed's would be compiled first, with nvcc; only where its states are offloaded from a GPU is it
    DeepSpeed's CPU Adam. In bf16, ZeRO-2 and ZeRO-3 sum the gradients of micro-batches in fp32. DeepSpeed does not time
    micro-batches: it would let the host wait for the whole device before and after each of them.

    Args:
        cuda: whether a GPU trains; null asks torch.

    Raises:
        UserError: for an unknown strategy, one that states the recipe's numbers, or batches that do not divide.
    """
    strategy = copy.deepcopy(read_strategy(stage))
    check_partition_groups(stage, strategy, world_size)
    if cuda is None:
        import torch

        cuda = torch.cuda.is_available()
    parameters = strategy.get("optimizer", {}).get("params", {})
    zero = strategy.get("zero_optimization", {})
    offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if not (cuda and offloaded):
        parameters = {"torch_adam": True, "fused": True, **parameters}
    if not cuda:
        parameters["torch_adam"] = True
    is_bf16 = recipe.train.precision == "bf16"
    if zero.get("stage") == 3:
        zero.setdefault("memory_efficient_linear", False)  # kernels/linear.py does the same with less
    # Under ZeRO-1 DeepSpeed would take another optimizer wrapper for fp32 sums, whose checkpoints have another layout.
    sums = {"data_types": {"grad_accum_dtype": "fp32"}} if is_bf16 and zero.get("stage", 0) >= 2 else {}
    return {
        **sums,
        "timers": {"throughput": {"enabled": False}},
        **strategy,
        "train_batch_size": stage.global_batch_packs,
        "train_micro_batch_size_per_gpu": stage.micro_batch_packs,
        "gradient_accumulation_steps": accumulation_steps(stage, world_size),
        "gradient_clipping": float(stage.max_grad_norm),
        "bf16": {"enabled": is_bf16},
        "optimizer": {"type": "AdamW", "params": {**parameters, "betas": list(stage.betas)}},
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }


def fit_reduce_bucket(config: dict[str, Any], num_trainable: int) -> None:
    """Make the bucket of gradients no larger than all gradients together; no number changes.

    DeepSpeed 0.19.8 allocates it whole where `contiguous_gradients` asks for it, and under ZeRO-1 and 2 a second one
    where it overlaps the reduction: a GiB and more for a connector that learns alone.

    Args:
        config: DeepSpeed's configuration, changed in place.
        num_trainable: elements of all parameters that learn.
    """
    zero = config["zero_optimization"]
    zero["reduce_bucket_size"] = min(num_trainable, int(zero.get("reduce_bucket_size", DEFAULT_BUCKET)))


def check_partition_groups(stage: StageConfig, strategy: dict[str, Any], world_size: int) -> None:
    """ZeRO++ keeps a second partition inside groups of ranks (a node): they must divide the world."""
    group = strategy.get("zero_optimization", {}).get("zero_hpz_partition_size", 1)
    if world_size % group:
        raise UserError(
            f"deepspeed {stage.deepspeed!r} has zero_hpz_partition_size {group}, which does not divide "
            f"{world_size} ranks; use a multiple of it, or 'zero3'"
        )
