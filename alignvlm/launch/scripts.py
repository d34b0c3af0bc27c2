"""Where the files of launch/ are, and whether a recipe fits a number of processes. Starts nothing."""

from __future__ import annotations

from pathlib import Path

from alignvlm.config import deepspeed_config
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.resources import resource
from alignvlm.run_folder import Run


def find_launcher(name: str) -> Path:
    """A file of launch/, for example "slurm/train.sbatch"; UserError when this installation lacks it."""
    path = resource("launch", name)
    if not path.is_file():
        raise UserError(f"{path} is missing: install alignvlm again")
    return path


def check_world(recipe: Recipe, world_size: int, *, cuda: bool) -> None:
    """Check that batches, accumulation and sharding of all stages that are not finished fit the number of processes.

    Raises:
        UserError: names the stage, the numbers and values that would fit.
    """
    run = Run(recipe)
    for stage in recipe.stages.values():
        if not run.stage_folder(stage).has_export:
            deepspeed_config(recipe, stage, world_size, cuda=cuda)
