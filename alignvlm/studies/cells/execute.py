"""Training the cells of a study, on this machine in turn. Each is an ordinary run: what is finished is passed over."""

from __future__ import annotations

import sys
from collections.abc import Callable

from alignvlm.checks import check_files
from alignvlm.errors import UserError
from alignvlm.launch.local import run_local
from alignvlm.progress import say
from alignvlm.studies.cells.grid import Cell, Grid
from alignvlm.system.signals import REQUEUE
from alignvlm.training.finished import is_finished

INTERRUPTED = frozenset({REQUEUE, 130})
"""Exit codes of a run that was asked to stop: so was the study."""
MISTAKE = 2


def train_cells(grid: Grid, after_each: Callable[[], object] = lambda: None) -> list[str]:
    """Train every cell that is not finished; returns the names of those that failed.

    Args:
        after_each: called when a cell has been trained, for what is shown meanwhile.

    Raises:
        UserError: a cell's recipe cannot run. StoppedError: a signal stopped a cell, with everything saved.
    """
    for cell in grid.of_seed(grid.seeds[0]):
        check_files(cell.recipe)
    failed = []
    for number, cell in enumerate(grid.cells, 1):
        place = f"study {grid.study}, cell {number} of {len(grid.cells)}: {cell.name}"
        if is_finished(cell.run):
            say(f"{place}: finished before")
            continue
        say(f"\n{place}")
        code = run_local(command(cell), cell.recipe.train.processes)
        if code in INTERRUPTED:
            raise StoppedError(f"{place}: stopped; the same command goes on from here")
        if code == MISTAKE:
            raise UserError(f"{place}: the run was refused, see the line above")
        if code:
            failed.append(cell.name)
            say(f"{place}: failed with exit code {code}; the study goes on with the next cell")
        after_each()
    return failed


def unfinished(grid: Grid) -> list[Cell]:
    """The cells that are left to train."""
    return [cell for cell in grid.cells if not is_finished(cell.run)]


class StoppedError(Exception):
    """A signal ended the cell that was training; it and the study resume with the same command."""


def command(cell: Cell) -> list[str]:
    """The command that trains a cell."""
    return [sys.executable, "-m", "alignvlm", "train", cell.recipe_name, *cell.overrides]
