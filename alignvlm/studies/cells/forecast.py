"""What a study would take before it runs: cells, steps, and hours where a step of theirs was ever measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignvlm.config.schema import Recipe
from alignvlm.estimates.steps import stage_volume
from alignvlm.model.network import build_network
from alignvlm.run_folder import METRICS_LINE, Run, RunFolder
from alignvlm.studies.cells.grid import Cell, Grid
from data_pipeline.files import read_json_lines

Pace = dict[str, float]
"""Stage -> seconds of one optimizer step."""


@dataclass(frozen=True)
class Forecast:
    """One cell."""

    cell: Cell
    state: str
    """`finished`, `resumes` or `new`."""
    steps: dict[str, int]
    """Stage -> optimizer steps: by the plan where the shards are here, else by the recipe's figures."""
    left: float | None
    """Hours of the steps that are left; None where no step like its own was measured."""


def forecast(grid: Grid, step_seconds: float | None = None) -> list[Forecast]:
    """The cells in their order.

    The seconds of a step are, in this order: `step_seconds`, the cell's own so far, those of the same variant with
    another seed, those of any cell, those of the recipe's own run.
    """
    done = {cell.name: _steps_done(cell.run.folder) for cell in grid.cells}
    paces = {name: _pace(lines) for name, lines in done.items()}
    fallback = _mean([pace for pace in paces.values() if pace]) or _pace(_steps_done(Run(grid.base).folder))
    steps = {cell.variant.name: _steps(cell.recipe) for cell in grid.of_seed(grid.seeds[0])}
    found = []
    for cell in grid.cells:
        siblings = [paces[other.name] for other in grid.cells if other.variant == cell.variant]
        pace = paces[cell.name] or _mean([each for each in siblings if each]) or fallback
        left: float | None = 0.0
        for stage, count in ({} if cell.is_trained else steps[cell.variant.name]).items():
            taken = sum(line["stage"] == stage for line in done[cell.name])
            seconds = step_seconds or pace.get(stage)
            left = None if left is None or seconds is None else left + max(0, count - taken) * seconds / 3600
        state = "finished" if cell.is_trained else "resumes" if done[cell.name] else "new"
        found.append(Forecast(cell, state, steps[cell.variant.name], left))
    return found


def _steps(recipe: Recipe) -> dict[str, int]:
    dims = build_network(recipe).dims
    stages = recipe.stages.values()
    return {stage.name: stage_volume(recipe, stage, dims, recipe.train.processes).steps for stage in stages}


def describe(grid: Grid, cells: list[Forecast]) -> list[str]:
    """The forecast as lines of text."""
    width = max(len(each.cell.name) for each in cells)
    lines = [
        f"study {grid.study} of {grid.recipe_name}: {len(grid.variants)} variants x {len(grid.seeds)} seed(s) = "
        f"{len(cells)} runs in {grid.base.runs}"
    ]
    for each in cells:
        steps = f"{sum(each.steps.values()):,} steps"
        hours = "unknown" if each.left is None else f"{each.left:.2f} h left"
        lines.append(f"  {each.cell.name:{width}}  {each.state:8}  {steps:>12}  {hours:>11}  {_settings(each.cell)}")
    if any(each.left is None for each in cells):
        lines.append("hours: no step of this recipe was measured here yet; give one with --step-seconds SECONDS")
    else:
        total = math.fsum(each.left or 0 for each in cells)
        lines.append(f"hours: {total:.2f} of optimizer steps are left; start, evaluation and export come on top")
    return lines


def _settings(cell: Cell) -> str:
    return " ".join(cell.variant.overrides)


def _steps_done(folder: RunFolder) -> list[dict[str, Any]]:
    """Steps that are on disk, each once."""
    lines = read_json_lines(Path(folder.metrics), METRICS_LINE)
    return list({(line["stage"], line["step"]): line for line in lines}.values())


def _pace(lines: list[dict[str, Any]]) -> Pace:
    """The mean seconds of the steps, the first of each stage left out: it pays for warming up."""
    pace: Pace = {}
    for stage in dict.fromkeys(line["stage"] for line in lines):
        seconds = [float(line["seconds"]) for line in lines if line["stage"] == stage and line.get("seconds")]
        seconds = seconds[1:] or seconds
        if seconds:
            pace[stage] = math.fsum(seconds) / len(seconds)
    return pace


def _mean(paces: list[Pace]) -> Pace:
    stages = dict.fromkeys(stage for pace in paces for stage in pace)
    values = {stage: [pace[stage] for pace in paces if stage in pace] for stage in stages}
    return {stage: math.fsum(each) / len(each) for stage, each in values.items()}
