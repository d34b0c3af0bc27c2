"""Loads a checkpoint into an engine of any number of ranks: each reads its own share out of the files.

Each rank reads its numbers once, to where they belong, and sums up on the way the files of which it reads the most.
What the stage leaves frozen comes from the export that the engine was built from, so that it is not read
here. DeepSpeed's own loaders take the memory twice, and for another number of ranks a universal copy of the checkpoint
on the disk, which gives all groups the hyperparameters of the first one and all parameters one `step` tensor (0.19.8).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.checkpoint import constants as keys

from alignvlm.errors import UserError
from alignvlm.parts import module_name
from alignvlm.training.checkpoints.files.manifest import mismatch
from alignvlm.training.checkpoints.files.reading import Part, checked, read_parts
from alignvlm.training.checkpoints.files.written import Entry
from alignvlm.training.checkpoints.layout import MASTER, OPTIMIZER_FILES, SavedOptimizer, of_ranks
from alignvlm.training.distributed import World
from data_pipeline.files import reason

Slot = tuple[str, int, int, int]
"""(name of a parameter, begin, end, offset): its numbers `begin` to `end` are in a rank's flat group from `offset`."""


class Unchecked(NamedTuple):
    """A file whose checksum is checked while it is loaded."""

    path: Path
    expected: Entry

    def difference(self, actual: Entry) -> str | None:
        """What is wrong with the file, given what was read of it; None when nothing is."""
        return mismatch(self.path.name, self.expected, actual)


def load(engine: Any, folder: Path, world: World, own: Sequence[Unchecked] = ()) -> str | None:
    """Give an engine the weights, buffers, optimizer states and counters in DeepSpeed's files; all ranks call it.

    Learning rates and weight decay stay those of the engine's own groups.

    Args:
        own: files of the optimizer that this rank is to check, each of which is no other rank's.

    Returns:
        Which file of any rank is damaged, equal on all ranks. The engine is of no use then.

    Raises:
        UserError: on all ranks, when the files of the checkpoint are not laid out as they should be.
    """
    on_nvme = engine.zero_nvme_offload_optimizer()
    if on_nvme and (saved := len(of_ranks(folder, OPTIMIZER_FILES))) != world.size:
        raise UserError(
            f"{folder}: optimizer states on NVMe load with as many ranks as have saved them: {saved}, not {world.size}"
        )
    if on_nvme or engine.zero_optimization_stage() == 0:  # strategies of the user's own
        problem = world.first_problem(_damage(own, world))
        if problem is None:
            engine.load_checkpoint(str(folder.parent), tag=folder.name)
        return problem
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    problem = world.together(_read, engine, folder, world, own)
    if problem is not None:
        return problem
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
    return None


def _read(engine: Any, folder: Path, world: World, own: Sequence[Unchecked]) -> str | None:
    """Fill this rank's fp32 weights, make its optimizer states, set the module's buffers and the engine's counters."""
    problem, failure = None, None
    try:
        saved = SavedOptimizer(folder)
        problem = _fill(engine, saved, world, own)
        buffers = {module_name(name): saved.model["module"][name] for name in saved.model.get(keys.BUFFER_NAMES, ())}
        for name, buffer in engine.module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])
        for name in ("global_steps", "global_samples", "skipped_steps"):
            setattr(engine, name, saved.model[name])
    except Exception as error:  # in a file that is damaged anything may stand
        problem, failure = _damage(own, world), error
    problem = world.first_problem(problem)  # what this rank cannot read may be in the file of another one
    if problem is None and failure is not None:
        if not isinstance(failure, (ValueError, KeyError, IndexError, OSError)):
            raise failure
        raise UserError(
            f"{folder}: rank {world.rank} of {world.size} cannot read its part ({reason(failure)}); remove "
            f"{folder.parent} to resume from an older checkpoint"
        ) from failure
    return problem


def _damage(own: Sequence[Unchecked], world: World) -> str | None:
    """What is wrong with the first damaged one of these files, which are read as wholes."""
    for file in own:
        try:
            problem = file.difference(checked(file.path, lambda count: world.beat()))
        except OSError as error:
            problem = f"{file.path.name}: {reason(error)}"
        if problem is not None:
            return problem
    return None


def _fill(engine: Any, saved: SavedOptimizer, world: World, own: Sequence[Unchecked]) -> str | None:
    """Read this rank's weights and states; what is wrong with a file that it is to check."""
    inner = engine.optimizer.optimizer
    is_fused = any(group.get("fused") for group in inner.param_groups)
    moments = [key for key, value in saved.state().items() if isinstance(value, torch.Tensor) and value.dim()]
    shared = {key: value for key, value in saved.state().items() if key not in moments}
    parts: dict[Path, list[Part]] = defaultdict(list)
    for flat, slots in _groups(engine, world):
        values = {MASTER: flat.data} | {key: torch.empty_like(flat.data) for key in moments}
        end = 0
        for name, low, high, offset in slots:
            for key, target in values.items():
                if key != MASTER:
                    target[end:offset].zero_()  # padding
                at = offset
                for path, first, dtype, count in saved.find(name, key, low, high):
                    parts[path].append(Part(first, dtype, target[at : at + count]))
                    at += count
            end = offset + high - low
        for key in moments:
            values[key][end:].zero_()
        state = {key: _own(value, flat if is_fused else None) for key, value in shared.items()}
        if saved.state():
            inner.state[flat] = state | {key: values[key] for key in moments}
    for group in inner.param_groups:
        if "step" in saved.hyperparameters:  # optimizers that count there
            group["step"] = saved.hyperparameters["step"]
    for file in own:
        problem = file.difference(checked(file.path, lambda count: world.beat(), parts.pop(file.path, ())))
        if problem is not None:
            return problem
    for path, of_file in parts.items():
        read_parts(path, of_file, lambda count: world.beat())
    return None


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
