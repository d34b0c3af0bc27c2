"""Resume with another number of ranks: DeepSpeed's universal checkpoint, and its ZeRO-3 loader's mistakes put right.

The loader copies the hyperparameters of group 0 to all groups and shares one `step` tensor between all parameters, so
that every further step counts many times over. Both are silent; `repair` undoes them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from alignvlm.training.checkpoints.store import TAG, UNIVERSAL_SUFFIX, Found
from alignvlm.training.distributed import World
from alignvlm.training.optim import Group

UNIVERSAL = {"checkpoint": {"load_universal": True}}
"""What the DeepSpeed config needs for `load`."""


def convert(found: Found, world: World) -> Path:
    """A universal copy of a checkpoint beside it, made by rank 0; every rank calls it.

    Raises:
        RuntimeError: the conversion failed; with its output.
    """
    folder = found.folder.with_name(found.folder.name + UNIVERSAL_SUFFIX)
    problem = None
    if world.is_main and not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
        folders = ["--input_folder", str(found.folder / TAG), "--output_folder", str(folder / TAG)]
        workers = ["--num_extract_workers", "2", "--num_merge_workers", "2"]
        result = subprocess.run([*program, *folders, *workers], capture_output=True, text=True, check=False)
        if result.returncode:
            problem = result.stdout[-2000:] + result.stderr[-2000:]
        else:
            (folder / "done").touch()
    problem = world.broadcast(problem)
    if problem is not None:
        raise RuntimeError(f"{found.folder}: conversion to {world.size} ranks failed:\n{problem}")
    return folder


def load(engine: Any, folder: Path, groups: list[Group]) -> None:
    """Load a universal checkpoint into an engine whose config holds `UNIVERSAL`."""
    engine.load_checkpoint(str(folder), tag=TAG)
    repair(engine.optimizer, groups)


def repair(optimizer: Any, groups: list[Group]) -> None:
    """Give every group its own weight decay again and every parameter its own step count.

    Learning rates are set anew before each step anyway (optim.set_lr).
    """
    for target, group in zip(optimizer.param_groups, groups, strict=True):
        target["weight_decay"] = group.weight_decay
        target["lr"] = group.lr
    for state in optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
