"""Where the files of launch/ are, and whether a recipe can run on so many processes. Starts nothing."""

from __future__ import annotations

import sys
from pathlib import Path

from alignvlm.config import deepspeed_config
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError


def find_launcher(name: str) -> Path:
    """A file of launch/, for example "slurm/train.sbatch": in a checkout, else where an installation puts it."""
    folders = (Path(__file__).resolve().parents[2] / "launch", Path(sys.prefix) / "share" / "alignvlm" / "launch")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"launch/{name} is neither in {folders[0]} nor in {folders[1]}: install alignvlm again")


def check_world(recipe: Recipe, world_size: int, *, cuda: bool) -> None:
    """Every stage's batches, accumulation and sharding must fit so many processes.

    Raises:
        UserError: names the stage, the numbers and values that would fit.
    """
    for stage in recipe.stages.values():
        deepspeed_config(recipe, stage, world_size, cuda=cuda)
