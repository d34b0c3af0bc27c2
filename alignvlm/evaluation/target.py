"""Which model `alignvlm eval` evaluates, and the recipe that names the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from alignvlm.config import load_recipe
from alignvlm.config.load import SUFFIXES
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.exports import check_export
from alignvlm.run_folder import Run, run_of_export
from data_pipeline.errors import nearest


def find_target(
    target: str, overrides: Sequence[str] = (), recipe_name: str | None = None, stage_name: str | None = None
) -> tuple[Recipe, Path]:
    """The recipe and the export folder for a target that is either of the two.

    Args:
        target: a recipe, for an export of its run, or an export folder, for the recipe that its run was started with.
        overrides: settings of the recipe to change, `dotted.key=value`.
        recipe_name: for an export folder, another recipe than its run's.
        stage_name: for a recipe, another stage than the newest with an export; `init` is the model before training.

    Raises:
        UserError: an export without a recipe, a run without an export, or an unknown stage.
    """
    if Path(target).is_dir():
        return _recipe_of(Path(target), overrides, recipe_name), Path(target)
    if "/" in target and not target.endswith(SUFFIXES) and not Path(target).exists():
        raise UserError(f"{target}: no such export folder; or give a recipe")
    recipe = load_recipe(target, overrides)
    run = Run(recipe)
    if stage_name is None:
        newest = run.newest_export()
        if newest is None:
            raise UserError(f"{run.folder.path} has no export yet; train it first: alignvlm train {target}")
        return recipe, newest
    folders = {folder.name: folder for folder in run.stage_folders()}
    if stage_name not in folders:
        raise UserError(f"recipe {recipe.name!r} has no stage {stage_name!r}: {nearest(stage_name, folders)}")
    if not folders[stage_name].has_export:
        raise UserError(f"stage {stage_name!r} has no export yet ({folders[stage_name].export})")
    return recipe, folders[stage_name].export


def _recipe_of(export: Path, overrides: Sequence[str], name: str | None) -> Recipe:
    resolved = run_of_export(export).config
    check_export(export)
    if name is None and not resolved.is_file():
        raise UserError(f"{export} does not belong to a run: name the recipe with the tasks, --recipe RECIPE")
    return load_recipe(name or str(resolved), overrides)
