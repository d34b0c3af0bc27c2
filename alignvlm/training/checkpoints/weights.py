"""Reads the weights of a checkpoint tensor by tensor, whatever ZeRO stage and number of ranks wrote it.

Files are mapped, not loaded: a model of any size takes the memory of its largest tensor. What a stage trains comes from
the optimizer's fp32 masters, the rest in the precision that it was trained with. The layout of DeepSpeed's files is
that of `deepspeed/utils/zero_to_fp32.py` (0.19.8), which reads them whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants as keys

from alignvlm.parts import module_name
from data_pipeline.files import reason

Pieces = tuple[list[torch.Tensor], tuple[int, ...]]
"""Flat tensors that follow each other, perhaps with padding at their end, and the shape that they have together."""


class CheckpointWeights:
    """The weights in a folder of DeepSpeed's files, by the modules' names; tied ones under each of their names."""

    def __init__(self, folder: Path) -> None:
        """Opens all files of `folder`.

        Raises:
            ValueError: they are not laid out as DeepSpeed 0.19 lays them out.
        """
        models = [_map(path) for path in _of_ranks(folder, "*_model_states.pt")]
        optimizers = [_map(path)[keys.OPTIMIZER_STATE_DICT] for path in _of_ranks(folder, "*_optim_states.pt")]
        if not models or not optimizers:
            raise ValueError(f"{folder} has no files of a ZeRO checkpoint")
        first = models[0]
        self._pieces: dict[str, Pieces] = {
            name: ([first["module"][name].flatten()], tuple(first["module"][name].shape))
            for name in first[keys.BUFFER_NAMES]
        }
        is_partitioned = optimizers[0][keys.ZERO_STAGE] == 3
        frozen = first.get(keys.FROZEN_PARAM_SHAPES) or {}
        holders = models if is_partitioned else models[:1]
        for name, shape in frozen.items():
            parts = [model[keys.FROZEN_PARAM_FRAGMENTS][name].flatten() for model in holders]
            self._pieces[name] = (parts, tuple(shape))
        trained = _zero3 if is_partitioned else _zero2
        self._pieces |= trained(first[keys.PARAM_SHAPES], optimizers)
        for name, owner in first["shared_params"].items():
            if owner in self._pieces:
                self._pieces[name] = self._pieces[owner]
        self._pieces = {module_name(name): pieces for name, pieces in self._pieces.items()}

    @property
    def names(self) -> set[str]:
        return set(self._pieces)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor as a copy in memory; in fp32 when it is one of floating-point numbers."""
        parts, shape = self._pieces[name]
        flat = torch.cat(parts)[: math.prod(shape)].view(shape)
        return flat.float() if flat.is_floating_point() else flat


def _zero2(groups: Sequence[dict[str, Any]], optimizers: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Pieces]]:
    """Under ZeRO-1 and 2 a group's parameters stand one after the other, and the ranks share them in equal parts."""
    paddings = optimizers[0].get(keys.PARAM_ALIGNMENT_PADDINGS)
    for number, shapes in enumerate(groups):
        flats = [optimizer[keys.SINGLE_PARTITION_OF_FP32_GROUPS][number] for optimizer in optimizers]
        begin = 0
        for index, (name, shape) in enumerate(shapes.items()):
            size = math.prod(shape)
            yield name, (_cut(flats, begin, size), tuple(shape))
            begin += size + (paddings[number][index] if paddings else 0)


def _zero3(groups: Sequence[dict[str, Any]], optimizers: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Pieces]]:
    """Under ZeRO-3 every rank has an equal part of each parameter, the last one padded."""
    begin = 0
    for name, shape in (each for shapes in groups for each in shapes.items()):
        size = math.ceil(math.prod(shape) / len(optimizers))
        parts = [part for optimizer in optimizers for part in _cut(optimizer[keys.FP32_FLAT_GROUPS], begin, size)]
        yield name, (parts, tuple(shape))
        begin += size


def _cut(flats: Sequence[torch.Tensor], begin: int, size: int) -> list[torch.Tensor]:
    """Views of `size` numbers from `begin` on, of tensors that follow each other."""
    end, offset, found = begin + size, 0, []
    for flat in flats:
        first, last = max(begin - offset, 0), min(end - offset, flat.numel())
        if first < last:
            found.append(flat[first:last])
        offset += flat.numel()
    if sum(part.numel() for part in found) != size:
        raise ValueError(f"numbers {begin:,} to {end:,} of a group that has {offset:,}")
    return found


def _of_ranks(folder: Path, pattern: str) -> list[Path]:
    """Files in the order of the ranks that are in their names: 2 before 10."""
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _map(path: Path) -> dict[str, Any]:
    """A file's content, its tensors mapped; of classes it may hold DeepSpeed's own only, and nothing that is run."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # whatever the unpickler raises
            raise ValueError(f"{path}: {reason(error)}") from error
