"""Reads the weights of a checkpoint tensor by tensor, whatever ZeRO stage and number of ranks wrote it.

Files are mapped, not loaded: a model of any size takes the memory of its largest tensor. What a stage trains comes from
the optimizer's fp32 masters, the rest in the precision that it was trained with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from deepspeed.checkpoint import constants as keys

from alignvlm.model.lora import Adapters
from alignvlm.parts import module_name
from alignvlm.training.checkpoints.layout import MASTER, SavedOptimizer, map_file, of_ranks

Pieces = tuple[list[torch.Tensor], tuple[int, ...]]
"""Flat tensors that follow each other, perhaps with padding at their end, and the shape that they have together."""
Read = Callable[[Pieces], torch.Tensor]


class CheckpointWeights:
    """The weights in a folder of DeepSpeed's files, by the modules' names; tied ones under each of their names.

    Those with adapters are merged: what was trained of a layer is the sum.
    """

    def __init__(self, folder: Path, split_off: Callable[[dict[str, Pieces], Read], Adapters] | None = None) -> None:
        """Opens all files of `folder`; `split_off` takes the adapters of a stage that has some out of its weights.

        Raises:
            ValueError: they are not laid out as DeepSpeed 0.19 lays them out.
        """
        saved = SavedOptimizer(folder)
        first = saved.model
        self._pieces: dict[str, Pieces] = {
            module_name(name): ([first["module"][name].flatten()], tuple(first["module"][name].shape))
            for name in first[keys.BUFFER_NAMES]
        }
        frozen = first.get(keys.FROZEN_PARAM_SHAPES) or {}
        holders = [first]
        if frozen and saved.is_partitioned:
            holders += [map_file(path) for path in of_ranks(folder, "*_model_states.pt")[1:]]
        for name, shape in frozen.items():
            parts = [model[keys.FROZEN_PARAM_FRAGMENTS][name].flatten() for model in holders]
            self._pieces[module_name(name)] = (parts, tuple(shape))
        for name, place in saved.places.items():
            self._pieces[name] = (saved.read(name, MASTER, 0, math.prod(place.shape)), place.shape)
        for name, owner in first["shared_params"].items():
            if module_name(owner) in self._pieces:
                self._pieces[module_name(name)] = self._pieces[module_name(owner)]
        self.adapters = None if split_off is None else split_off(self._pieces, _together)

    @property
    def names(self) -> set[str]:
        return set(self._pieces)

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor as a copy in memory; in fp32 when it is one of floating-point numbers."""
        tensor = _together(self._pieces[name])
        return tensor if self.adapters is None else self.adapters.merge(name, tensor)


def _together(pieces: Pieces) -> torch.Tensor:
    parts, shape = pieces
    flat = torch.cat(parts)[: math.prod(shape)].view(shape)
    return flat.float() if flat.is_floating_point() else flat
