"""What studies measure on the exports of trained cells: kept beside the export until it or the settings change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.evaluation.scores import metrics_of
from alignvlm.evaluation.vocabulary_mass import images_of
from alignvlm.progress import say
from alignvlm.studies.cells.grid import Cell
from data_pipeline.checksums import stamps
from data_pipeline.files import must_write, read_json, to_json, write_atomic

SHAPE = {"made_from": list, "found": dict}
WAY_OUT = "make the run's folder writable"


def kept(cell: Cell, name: str, settings: list[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds on the cell's last export, read from `<stage>/<name>.json` where it was measured before."""
    stage = cell.last_stage
    path = stage.analysis(name)
    made_from = [settings, stamps(sorted(stage.export.iterdir()))]
    known = read_json(path, SHAPE)
    if known and known["made_from"] == made_from:
        return known["found"]
    say(f"{cell.name}: measuring {name}")
    found = measure()
    with must_write(path, WAY_OUT):
        write_atomic(path, to_json({"made_from": made_from, "found": found}, indent=1, ensure_ascii=False) + "\n")
    return found


def held_out_images(recipe: Recipe, count: int) -> list[Any]:
    """About `count` images of the recipe's tasks, evenly spread. Raises UserError for a recipe without tasks."""
    folders = dict.fromkeys(recipe.data.sources[task.source].folder for task in recipe.evaluation.tasks.values())
    if not folders:
        raise UserError(f"recipe {recipe.name} has no evaluation.tasks, whose images the study measures")
    return list(images_of(list(folders), count))


def scores_of(results: dict[str, Any]) -> dict[str, float]:
    """Task -> score by its first metric, of an evaluation's results.json."""
    return {task: float(entry[next(iter(metrics_of(entry)))]) for task, entry in results["tasks"].items()}


def task_settings(recipe: Recipe) -> dict[str, list[Any]]:
    """Task -> what decides its images, replies and score, as JSON would give it back."""
    return {
        name: [task.source, recipe.data.sources[task.source].prompt, task.limit, task.max_new_tokens, [*task.metrics]]
        for name, task in recipe.evaluation.tasks.items()
    }


def without_gallery(recipe: Recipe) -> Recipe:
    """The recipe with an evaluation that saves no pictures."""
    return replace(recipe, evaluation=replace(recipe.evaluation, gallery=0))


def evaluation_place(cell: Cell, name: str) -> Path:
    """Folder of another evaluation of the cell's last export."""
    return cell.last_stage.analysis(name).with_suffix("")
