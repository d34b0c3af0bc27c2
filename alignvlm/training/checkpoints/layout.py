"""Where DeepSpeed's files of a ZeRO checkpoint have each number of a parameter, whatever number of ranks wrote them.

Files are mapped, not loaded, and only when something in them is asked for. The layout is that of DeepSpeed 0.19.8
(`deepspeed/utils/zero_to_fp32.py` reads it whole).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import constants as keys
from torch._subclasses.fake_tensor import FakeTensorMode

from alignvlm.parts import module_name
from data_pipeline.files import reason

OPTIMIZER_FILES = "*_optim_states.pt"
"""One of each rank."""
MASTER = "fp32"
"""Name of the weights among a parameter's values; others are the optimizer's (`exp_avg`, …)."""


@dataclass(frozen=True)
class Place:
    """A parameter in its group: number `i` of it is rank `(shift + i) // unit`'s number `base + (shift + i) % unit`."""

    group: int
    base: int
    unit: int
    shift: int
    shape: tuple[int, ...]


class SavedOptimizer:
    """What a stage trains, in a folder of DeepSpeed's files: fp32 weights and optimizer states, by modules' names."""

    def __init__(self, folder: Path) -> None:
        """Opens the files of the first rank.

        Raises:
            ValueError: they are not laid out as DeepSpeed 0.19 lays them out.
        """
        models, self.paths = of_ranks(folder, "*_model_states.pt"), of_ranks(folder, OPTIMIZER_FILES)
        if not models or not self.paths:
            raise ValueError(f"{folder} has no files of a ZeRO checkpoint")
        self.model = map_file(models[0])
        self._state = cache(lambda rank: map_file(self.paths[rank])[keys.OPTIMIZER_STATE_DICT])
        self._outline = cache(lambda rank: outline(self.paths[rank])[keys.OPTIMIZER_STATE_DICT])
        self.is_partitioned = self._state(0)[keys.ZERO_STAGE] == 3
        count = self._state(0)[keys.PARTITION_COUNT]  # under ZeRO-1 and 2 of each group
        if (ranks := count if self.is_partitioned else max(count)) != len(self.paths):
            raise ValueError(f"{folder} has files of {len(self.paths)} ranks' optimizers, {ranks} have saved them")
        trained = self._zero3 if self.is_partitioned else self._zero2
        self.places = {module_name(name): place for name, place in trained(self.model[keys.PARAM_SHAPES])}

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """The optimizer's settings for the first group of parameters."""
        return self._of_optimizer[keys.PARAM_GROUPS][0]

    def state(self, group: int = 0) -> dict[str, Any]:
        """The first rank's optimizer state of a group; empty when no step has been taken."""
        return self._of_optimizer["state"].get(group, {})

    def read(self, name: str, key: str, begin: int, end: int) -> list[torch.Tensor]:
        """Numbers `begin` to `end` of a parameter's fp32 weights or of a state of it, as mapped tensors in a row.

        Raises:
            KeyError: the stage has not trained it. ValueError: the files are not laid out as they should be.
        """
        group = self.places[name].group
        return [self._flat(rank, group, key)[low:high] for rank, low, high in self._shares(name, key, begin, end)]

    def find(self, name: str, key: str, begin: int, end: int) -> Iterator[tuple[Path, int, torch.dtype, int]]:
        """Where `read` would read: files, and the first byte, type and amount of the numbers in each."""
        group = self.places[name].group
        for rank, low, high in self._shares(name, key, begin, end):
            flat = self._flat_in(self._outline(rank), group, key)
            begins = flat.untyped_storage()._checkpoint_offset
            assert begins is not None, "it was read as an outline"
            first = begins + (int(flat.storage_offset()) + low) * flat.itemsize
            yield self.paths[rank], first, flat.dtype, high - low

    def _shares(self, name: str, key: str, begin: int, end: int) -> list[tuple[int, int, int]]:
        """Ranks, and from where to where each one's flat tensor has these numbers."""
        place, found = self.places[name], []
        first, last = place.shift + begin, place.shift + end
        for rank in range(first // place.unit, -(-last // place.unit)) if end > begin else ():
            low, high = max(first - rank * place.unit, 0), min(last - rank * place.unit, place.unit)
            available = len(self._flat(rank, place.group, key))
            found.append((rank, min(place.base + low, available), min(place.base + high, available)))
        if sum(high - low for _, low, high in found) != end - begin:
            raise ValueError(f"{name}: numbers {begin:,} to {end:,} of {key} are not in the files")
        return found

    def _flat(self, rank: int, group: int, key: str) -> torch.Tensor:
        if rank >= len(self.paths):
            raise ValueError(f"there is no file of rank {rank}")
        return self._flat_in(self._state(rank), group, key)

    def _flat_in(self, state: dict[str, Any], group: int, key: str) -> torch.Tensor:
        if key == MASTER:
            name = keys.FP32_FLAT_GROUPS if self.is_partitioned else keys.SINGLE_PARTITION_OF_FP32_GROUPS
            return state[name][group]
        return self._optimizer_in(state)["state"][group][key]

    @property
    def _of_optimizer(self) -> dict[str, Any]:
        return self._optimizer_in(self._state(0))

    def _optimizer_in(self, state: dict[str, Any]) -> dict[str, Any]:
        return state[keys.OPTIMIZER_STATE_DICT if self.is_partitioned else keys.BASE_OPTIMIZER_STATE]

    def _zero2(self, groups: list[dict[str, Any]]) -> Iterator[tuple[str, Place]]:
        """Under ZeRO-1 and 2 a group's parameters stand one after the other, and ranks share them in equal parts."""
        paddings = self._state(0).get(keys.PARAM_ALIGNMENT_PADDINGS)
        for number, shapes in enumerate(groups):
            unit, begin = self._flat(0, number, MASTER).numel(), 0
            for index, (name, shape) in enumerate(shapes.items()):
                yield name, Place(number, 0, unit, begin, tuple(shape))
                begin += math.prod(shape) + (paddings[number][index] if paddings else 0)

    def _zero3(self, groups: list[dict[str, Any]]) -> Iterator[tuple[str, Place]]:
        """Under ZeRO-3 every rank has an equal part of each parameter, the last one padded."""
        for number, shapes in enumerate(groups):
            begin = 0
            for name, shape in shapes.items():
                size = math.ceil(math.prod(shape) / len(self.paths))
                yield name, Place(number, begin, max(size, 1), 0, tuple(shape))
                begin += size


def of_ranks(folder: Path, pattern: str) -> list[Path]:
    """Files in the order of the ranks that are in their names: 2 before 10."""
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def map_file(path: Path) -> dict[str, Any]:
    """A file's content, its tensors mapped; of classes it may hold DeepSpeed's own only, and nothing that is run.

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    return _load(path, mmap=True)


def outline(path: Path) -> dict[str, Any]:
    """A file's content, its tensors without numbers; their storages know their place in it (`_checkpoint_offset`)."""
    with FakeTensorMode():
        return _load(path)


def _load(path: Path, **options: Any) -> dict[str, Any]:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, **options)
        except Exception as error:  # whatever the unpickler raises
            raise ValueError(f"{path}: {reason(error)}") from error
