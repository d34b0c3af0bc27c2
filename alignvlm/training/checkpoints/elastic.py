"""Resume with another number of ranks: DeepSpeed's universal checkpoint, and a repair of its ZeRO-3 loader.

The loader of DeepSpeed 0.19.8 has two silent faults with several parameter groups
(`DeepSpeedZeroOptimizer_Stage3.load_hp_checkpoint_state_from_checkpoint_dir_stage3` in `runtime/zero/stage3.py`):

- it copies the saved hyperparameters of group 0 to every group (`param_groups[0].items()`), weight decay included;
- it gives every parameter the same `step` tensor (`state[fp32_param]["step"] = state_step`), which AdamW then
  increments once per parameter.

Without the repair, weights drifted by 2e-2 within ten steps. Delete `repair` when a release has neither fault:
`tests/integration/test_elastic.py` passes without it then.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from alignvlm.errors import UserError
from alignvlm.parts import module_name
from alignvlm.training.checkpoints.store import TAG, UNIVERSAL_SUFFIX, CheckpointInfo
from alignvlm.training.distributed import World
from alignvlm.training.optim import Group
from data_pipeline.files import reason

UNIVERSAL = {"checkpoint": {"load_universal": True}}
"""Added to the DeepSpeed config of an engine that `load` fills."""


def convert(checkpoint: CheckpointInfo, world: World) -> Path:
    """Folder of the checkpoint's universal copy, which rank 0 writes beside it; every rank calls it.

    Raises:
        UserError: the conversion failed, for example because the disk is full.
    """
    folder = checkpoint.folder.with_name(checkpoint.folder.name + UNIVERSAL_SUFFIX)
    problem = None
    if world.is_main:
        if not (folder / "done").exists():
            problem = _write_universal(checkpoint, folder)
        if problem is None:
            try:
                for weight in (folder / TAG / "zero").iterdir():  # of an earlier version, under a public name
                    weight.rename(weight.with_name(module_name(weight.name)))
                (folder / "done").touch()
            except OSError as error:
                problem = reason(error)
    problem = world.broadcast(problem)
    if problem is not None:
        raise UserError(
            f"{checkpoint.folder}: the conversion from {checkpoint.state['world_size']} to {world.size} ranks failed "
            f"({problem}); free some space, or start with as many ranks as before"
        )
    return folder


def _write_universal(checkpoint: CheckpointInfo, folder: Path) -> str | None:
    """Run DeepSpeed's converter; returns the last line of what it says where it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    program = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    folders = ["--input_folder", str(checkpoint.folder / TAG), "--output_folder", str(folder / TAG)]
    workers = ["--num_extract_workers", "2", "--num_merge_workers", "2"]
    result = subprocess.run([*program, *folders, *workers], capture_output=True, text=True, check=False)
    return (result.stderr or result.stdout).rstrip().rpartition("\n")[2] if result.returncode else None


def load(engine: Any, folder: Path, groups: list[Group]) -> None:
    """Load a universal checkpoint into an engine whose config includes `UNIVERSAL`."""
    engine.load_checkpoint(str(folder), tag=TAG)
    repair(engine.optimizer, groups)


def repair(optimizer: Any, groups: list[Group]) -> None:
    """Give every group its own hyperparameters and every parameter its own `step` tensor, where AdamW wants it.

    Other hyperparameters are equal in all groups, and `optim.set_lr` sets the learning rates before each step.
    """
    for target, group in zip(optimizer.param_groups, groups, strict=True):
        target["weight_decay"] = group.weight_decay
        target["lr"] = group.lr
    is_fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, state in optimizer.optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            device = parameter.device if is_fused else state["step"].device
            state["step"] = state["step"].detach().clone().to(device)
