"""The story of a study: same batches for all cells, train what is not trained, analyse, write the page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from alignvlm.progress import data_progress, say
from alignvlm.studies.cells.batches import Batches, match_samples
from alignvlm.studies.cells.execute import train_cells
from alignvlm.studies.cells.grid import Cell, Grid
from alignvlm.studies.results.page import write_page
from alignvlm.studies.results.records import read_results


def run_study(grid: Grid, folder: Path) -> tuple[Path, list[str]]:
    """Train what is not trained and write the page after every cell; returns it, and the cells that failed.

    Called again it goes on where it stopped.

    Raises:
        UserError: a cell cannot run. StoppedError: a signal stopped it.
    """
    grid, batches = match_samples(grid, data_progress)
    failed = train_cells(grid, lambda: write_page(read_results(grid), batches, folder))
    return write_page(read_results(grid, analyse(grid)), batches, folder), failed


def report_study(grid: Grid, folder: Path) -> Path:
    """The page of what is trained so far; trains nothing."""
    matched: tuple[Grid, dict[str, Batches]] = match_samples(grid, data_progress)
    grid, batches = matched
    return write_page(read_results(grid, analyse(grid)), batches, folder)


def analyse(grid: Grid) -> dict[str, dict[str, Any]]:
    """Cell -> what the study measures on its export; nothing for studies that measure nothing."""
    return {cell.name: _analyse(grid, cell) for cell in grid.cells if cell.is_trained}


def _analyse(grid: Grid, cell: Cell) -> dict[str, Any]:
    found = grid.study.analyse(cell)
    if found:
        say(f"study {grid.study.name}: {cell.name} is measured")
    return found
