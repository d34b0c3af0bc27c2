"""fp32 master weights from stage to stage: in bf16 an export holds them rounded, and the next stage would start there.

They lie beside the export, in one safetensors file, until the next stage is exported. Rank 0 writes it tensor by
tensor; each rank reads its own part of it, whatever the number of ranks was that trained it. Checkpoints hold the
masters by themselves.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from alignvlm.exports import read_tensor_places
from alignvlm.model.lora import Adapters
from alignvlm.parts import public_name
from alignvlm.progress import say
from alignvlm.run_folder import StageFolder
from alignvlm.training.checkpoints.gathering import master, merged
from alignvlm.training.distributed import World
from data_pipeline.errors import DataError
from data_pipeline.files import must_write, open_atomic, read_needed, reason

log = logging.getLogger(__name__)
FLOAT = np.dtype("<f4")
Places = dict[str, tuple[int, tuple[int, ...]]]
"""Name -> (byte in the file, shape)."""


def save_masters(
    engine: Any, before: StageFolder, folder: StageFolder, world: World, adapters: Adapters | None = None
) -> None:
    """Write the masters of what the stage has trained, and those of `before` that it left frozen; all ranks call it.

    It is written before the export, which ends the stage. Layers that had `adapters` count as trained: their masters
    are the weights that the adapters were trained with, in the training's precision, with the adapters' masters.

    Raises:
        DataError: on all ranks, when rank 0 cannot write, for example because the disk is full.
    """
    trained = trainable(engine.module)
    values = gathered(list(trained.values()))
    if adapters is not None:
        layers = {f"{name}.weight": engine.module.get_submodule(name).weight for name in adapters.factors}
        trained |= {public_name(name): weight for name, weight in layers.items()}
        values = itertools.chain(values, (each.numpy() for each in merged(engine.module, adapters, world)))
    problem = None
    if world.is_main:
        shapes = {name: (0, tuple(_shape(parameter))) for name, parameter in trained.items()}
        try:
            _save(values, shapes, before, folder)
        except DataError as error:
            problem = error
    for _ in values:  # what a rank does not write, or no longer, is gathered all the same: the others wait for it
        pass
    world.raise_of_main(problem)
    if world.is_main:
        say(f"{folder.export}: weights in bf16; the next stage starts from the fp32 weights in {folder.masters.name}")


def gathered(parameters: Iterable[Any]) -> Iterator[np.ndarray]:
    """The fp32 master of each, whole and in the host's memory; all ranks take all of them, one after the other."""
    for parameter in parameters:
        yield master(parameter).numpy().astype(FLOAT, copy=False)


def _save(values: Iterable[np.ndarray], trained: Places, before: StageFolder, folder: StageFolder) -> None:
    """Write the values of `trained`, then what the stage left frozen: from `before`, or as it was written here once."""
    source = before if before.masters.exists() else folder
    carried: Places = {}
    if source.masters.exists():
        found = read_needed(source.masters, _places, _way_out(source))
        carried = {name: place for name, place in found.items() if name not in trained}
    with _writing(folder.masters, trained | carried) as file:
        for value in values:
            file.write(value.data)
        for place in carried.values():
            file.write(_read(source.masters, *place).data)


def remove_masters(before: StageFolder) -> None:
    """Remove the masters that a stage started from, once that stage is exported: nothing reads them again."""
    try:
        before.masters.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s is no longer needed and cannot be removed: %s", before.masters, reason(error))


def load_masters(engine: Any, before: StageFolder, world: World) -> None:
    """Give a new engine the masters that the stage before has left; all ranks call it. No tensor is read whole.

    Where there are none (the stage before trained nothing, or an earlier version did), those of DeepSpeed stay: the
    weights of the export.

    Raises:
        DataError: they are damaged, or are not those of the export.
    """
    if not world.broadcast(world.is_main and before.masters.exists()):
        if world.is_main and before.number > 0:
            say(f"{before.masters}: there is none, so this stage starts from the bf16 weights of {before.export}")
        return
    found = read_needed(before.masters, _places, _way_out(before))
    differing = []
    for name, parameter in trainable(engine.module).items():
        if name in found:
            offset, shape = found[name]
            same_shape = shape == tuple(_shape(parameter))
            if not same_shape or not _set(engine, parameter, _read(before.masters, offset, shape), world.rank):
                differing.append(name)
    first = next((name for names in world.all_gather(differing) for name in names), None)
    if first is not None:
        raise DataError(
            f"{before.masters}: {first} is not what {before.export} holds in bf16; they are not of the same training. "
            f"Restore the export, or {_way_out(before)}"
        )


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a stage trains, by public name."""
    return {public_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _set(engine: Any, parameter: Any, flat: np.ndarray, rank: int) -> bool:
    """Set this rank's part of a parameter's master; whether the parameter is the master's rounding there."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    value = torch.from_numpy(flat)
    if hasattr(parameter, "ds_id"):  # ZeRO-3: equal parts, the last one padded
        size = parameter.ds_tensor.numel()
        mine = value[rank * size : (rank + 1) * size]
        safe_set_local_fp32_param(parameter, torch.cat([mine, mine.new_zeros(size - len(mine))]))
        weights = parameter.ds_tensor.flatten()[: len(mine)]
    else:  # ZeRO-1 and 2: whatever the rank's part of the flat group has of it
        safe_set_full_fp32_param(parameter, value)
        mapping = parameter._hp_mapping
        if mapping is None:
            return True
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        mine, weights = value[start : start + size], mapping.lp_fragment
    if engine.zero_quantized_weights():  # an export is then what the ranks had sent each other
        return True
    return torch.equal(mine.to(weights.dtype), weights.cpu())


def _shape(parameter: Any) -> Iterable[int]:
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def _writing(path: Path, shapes: Places) -> Iterator[BinaryIO]:
    """A safetensors file whose tensors are written one after the other, in the order of `shapes`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "content": "fp32 master weights"}}
    end = 0
    for name, (_, shape) in shapes.items():
        begin, end = end, end + FLOAT.itemsize * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with must_write(path, "free some space; the same command writes it then"):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.name}.*.tmp"):  # of a job that was killed here
            left.unlink(missing_ok=True)
        if shutil.disk_usage(path.parent).free < end:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, it needs {end / 2**30:.1f} GiB")
        with open_atomic(path) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            yield file


def _places(path: Path) -> Places:
    """Where each tensor lies. Raises what damage makes it raise."""
    begin, tensors = read_tensor_places(path)
    found = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor["shape"])
        first, end = tensor["data_offsets"]
        if tensor["dtype"] != "F32" or end - first != FLOAT.itemsize * int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"{name} is not in fp32")
        found[name] = (begin + first, shape)
    return found


def _read(path: Path, offset: int, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor, flat and mapped: what is not looked at is not read."""
    return np.memmap(path, FLOAT, "c", offset, (int(np.prod(shape, dtype=np.int64)),))


def _way_out(before: StageFolder) -> str:
    return f"remove {before.masters} to start from the bf16 weights of {before.export}"
