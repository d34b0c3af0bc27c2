"""Loads a checkpoint into an engine of any number of ranks: each reads its own share out of the files.

Files are mapped, and of each one only what a rank needs is read, once, to where it belongs. What the stage leaves
frozen comes from the export that the engine was built from, so that it is not read here. DeepSpeed's own loaders take
the memory twice, and for another number of ranks a universal copy of the checkpoint on the disk, which gives all groups
the hyperparameters of the first one and all parameters one `step` tensor (0.19.8).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants as keys

from alignvlm.errors import UserError
from alignvlm.parts import module_name
from alignvlm.training.checkpoints.layout import MASTER, SavedOptimizer, of_ranks
from alignvlm.training.distributed import World
from data_pipeline.files import reason

THREADS = 4
"""That copy: memory that is new, and pages of a file, cost one processor more than the disk."""
PIECE = 1 << 24
"""Numbers that a thread copies at once."""
Slot = tuple[str, int, int, int]
"""A parameter's name, and its numbers `begin` to `end` that a rank's flat group has from `offset` on."""


def load(engine: Any, folder: Path, world: World) -> None:
    """Give an engine the weights, buffers, optimizer states and counters in DeepSpeed's files; all ranks call it.

    Learning rates and weight decay stay those of the engine's own groups.

    Raises:
        UserError: on all ranks, when a file of the checkpoint is missing or not as it should be.
    """
    on_nvme = engine.zero_nvme_offload_optimizer()
    if on_nvme and (saved := len(of_ranks(folder, "*_optim_states.pt"))) != world.size:
        raise UserError(
            f"{folder}: optimizer states on NVMe load with as many ranks as have saved them: {saved}, not {world.size}"
        )
    if on_nvme or engine.zero_optimization_stage() == 0:  # strategies of the user's own
        engine.load_checkpoint(str(folder.parent), tag=folder.name)
        return
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    world.together(_read, engine, folder, world)
    if engine.zero_optimization_stage() == 3:
        values = {
            keys.LOSS_SCALER: optimizer.loss_scaler,
            "dynamic_loss_scale": optimizer.dynamic_loss_scale,
            "overflow": False,
            keys.FP32_FLAT_GROUPS: optimizer.fp32_partitioned_groups_flat,
        }
        optimizer.load_state_dict([None] * world.rank + [values], load_optimizer_states=False)
    else:
        optimizer.update_lp_params()
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()


def _read(engine: Any, folder: Path, world: World) -> None:
    """Fill this rank's fp32 weights, make its optimizer states, set the module's buffers and the engine's counters."""
    try:
        saved = SavedOptimizer(folder)
        _fill(engine, saved, world)
        buffers = {module_name(name): saved.model["module"][name] for name in saved.model.get(keys.BUFFER_NAMES, ())}
        for name, buffer in engine.module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, saved.model[name])
    except (ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{folder}: rank {world.rank} of {world.size} cannot read its part ({reason(error)}); remove "
            f"{folder.parent} to resume from an older checkpoint"
        ) from error


def _fill(engine: Any, saved: SavedOptimizer, world: World) -> None:
    inner = engine.optimizer.optimizer
    is_fused = any(group.get("fused") for group in inner.param_groups)
    moments = [key for key, value in saved.state().items() if isinstance(value, torch.Tensor) and value.dim()]
    shared = {key: value for key, value in saved.state().items() if key not in moments}
    for flat, slots in _groups(engine, world):
        values = {MASTER: flat.data} | {key: torch.zeros_like(flat.data) for key in moments}
        with ThreadPoolExecutor(THREADS, "load") as threads:
            for _ in threads.map(lambda pair: pair[0].copy_(pair[1]), _pieces(saved, slots, values)):
                world.beat()
        state = {key: _own(value, flat if is_fused else None) for key, value in shared.items()}
        if saved.state():
            inner.state[flat] = state | {key: values[key] for key in moments}
    for group in inner.param_groups:
        if "step" in saved.hyperparameters:  # optimizers that count there
            group["step"] = saved.hyperparameters["step"]


def _pieces(
    saved: SavedOptimizer, slots: Iterator[Slot], values: dict[str, torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts of these tensors, each with the part of a file that belongs there."""
    for name, begin, end, offset in slots:
        for key, target in values.items():
            at = offset
            for part in saved.read(name, key, begin, end):
                yield from zip(target[at : at + len(part)].split(PIECE), part.split(PIECE), strict=True)
                at += len(part)


def _own(value: Any, like: torch.Tensor | None) -> Any:
    """A copy of what parameters must not share, such as AdamW's step: on the device of `like` if it is given."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone() if like is None else value.to(like.device, copy=True)


def _groups(engine: Any, world: World) -> Iterator[tuple[torch.Tensor, Iterator[Slot]]]:
    """This rank's flat fp32 weights of each of DeepSpeed's groups, and what is to be where in them."""
    optimizer, names = engine.optimizer, engine._get_zero_param_shapes()
    if engine.zero_optimization_stage() == 3:
        for flat, shapes in zip(optimizer.fp32_partitioned_groups_flat, names, strict=True):
            yield flat, _zero3(shapes, world)
        return
    for number, (flat, shapes) in enumerate(zip(optimizer.single_partition_of_fp32_groups, names, strict=True)):
        yield flat, _zero2(shapes, optimizer.round_robin_bit16_padding[number], world.rank * flat.numel(), flat.numel())


def _zero3(shapes: dict[str, Any], world: World) -> Iterator[Slot]:
    """An equal part of each parameter, the last one padded."""
    offset = 0
    for name, shape in shapes.items():
        count = math.prod(shape)
        size = math.ceil(count / world.size)
        yield name, min(world.rank * size, count), min((world.rank + 1) * size, count), offset
        offset += size


def _zero2(shapes: dict[str, Any], paddings: list[int], first: int, size: int) -> Iterator[Slot]:
    """What `size` numbers from `first` on have of the parameters, which stand one after the other with paddings."""
    begin = 0
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        count = math.prod(shape)
        low, high = max(first - begin, 0), min(first + size - begin, count)
        if low < high:
            yield name, low, high, begin + low - first
        begin += count + padding
