"""The story of a study: same batches for all cells, train what is not trained, analyse, write the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignvlm.estimates.steps import shards_are_here
from alignvlm.progress import data_progress
from alignvlm.studies.cells.batches import Batches, match_samples
from alignvlm.studies.cells.execute import train_cells
from alignvlm.studies.cells.grid import Grid
from alignvlm.studies.results.page import write_page
from alignvlm.studies.results.records import read_results
from alignvlm.studies.study import Study


def run_study(study: Study, grid: Grid, folder: Path) -> tuple[Path, list[str]]:
    """Train what is not trained and write the page after every cell; returns it, and the cells that failed.

    Called again it goes on where it stopped.

    Raises:
        UserError: a cell cannot run. StoppedError: a signal stopped it.
    """
    grid, batches = match(grid)
    failed = train_cells(grid, lambda: write_page(study, read_results(grid), batches, folder))
    return write_page(study, read_results(grid, analyse(study, grid)), batches, folder), failed


def report_study(study: Study, grid: Grid, folder: Path) -> Path:
    """The page of what is trained so far; trains nothing, and needs no training data for runs from elsewhere.

    Raises:
        UserError: a run was started with other settings than the study's.
    """
    here = all(shards_are_here(grid.base, stage) for stage in grid.base.stages.values())
    grid, batches = match(grid) if here else (grid, {})
    for cell in grid.cells if here else ():  # without the data the length of fitted packs is not known
        cell.run.check_recipe()
    return write_page(study, read_results(grid, analyse(study, grid)), batches, folder)


def match(grid: Grid) -> tuple[Grid, dict[str, Batches]]:
    """The data prepared and shown to be the same for all cells (`match_samples`)."""
    return match_samples(grid, data_progress)


def analyse(study: Study, grid: Grid) -> dict[str, dict[str, Any]]:
    """Trained cell -> what the study measures on its export."""
    return {cell.name: study.analyse(cell) for cell in grid.cells if cell.is_trained}
