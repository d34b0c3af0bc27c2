"""Tensors of a model in training, whole and on the CPU: weights, fp32 masters, adapters. All ranks call these alike."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from alignvlm.config.schema import StageConfig
from alignvlm.model.lora import Adapters, take_out
from alignvlm.training.distributed import World


def whole(parameter: Any) -> torch.Tensor:
    """A copy of a parameter as the model has it, gathered where ZeRO-3 partitions it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter] if hasattr(parameter, "ds_id") else []):
        return parameter.detach().cpu().clone()


def master(parameter: Any) -> torch.Tensor:
    """The fp32 master of a parameter in training; itself where there is none."""
    from deepspeed.utils import safe_get_full_fp32_param

    value = safe_get_full_fp32_param(parameter)  # one tensor on the device at a time
    return whole(parameter).float() if value is None else value.float().cpu()


def gather_adapters(model: Any, stage: StageConfig, base: Path, world: World) -> Adapters | None:
    """The masters of a stage's adapters, on rank 0; the model is left without adapters, as it was loaded.

    None where the stage has none.

    Args:
        base: the export that the stage began with.
    """
    if stage.lora is None:
        return None
    factors = {}
    for name, pair in take_out(model).items():
        a, b = map(master, pair)
        factors[name] = (a, b) if world.is_main else (torch.empty(0), torch.empty(0))
    return Adapters(stage, base, factors)


def merged(model: Any, adapters: Adapters, world: World) -> Iterator[torch.Tensor]:
    """The fp32 weights of the layers that had adapters, in their order, on rank 0; on others empty tensors."""
    for layer in adapters.factors:
        weight = whole(model.get_submodule(layer).weight)
        yield adapters.merge(f"{layer}.weight", weight) if world.is_main else torch.empty(0)
