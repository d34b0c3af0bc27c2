"""`alignvlm study`: train the variants of a recipe that answer a question, and write one page that compares them."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.cli.arguments import add_recipe, path, positive, positive_number, word
from alignvlm.cli.launch import add_slurm_options, slurm_job, submit
from alignvlm.errors import UserError
from data_pipeline.files import must_write, write_atomic
from data_pipeline.masking import mask

if TYPE_CHECKING:
    from alignvlm.launch.slurm import SlurmArray
    from alignvlm.studies.cells.grid import Cell, Grid


def add_parser(subparsers: Any) -> None:
    """Add `study` to the command line."""
    from alignvlm.studies.registry import STUDIES

    parser = subparsers.add_parser(
        "study",
        help="compare variants of a recipe over several seeds",
        description="Train every variant of a study with every seed as an ordinary run in the recipe's folder of runs, "
        "one after the other on this machine or as an array of Slurm, and write a page, results.json and table.md. "
        "What is trained is not trained again: the same command resumes.",
    )
    parser.add_argument("study", type=word, metavar="STUDY", help=f"one of {', '.join(STUDIES)}")
    add_recipe(parser, "stages.joint.max_steps=500")
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="seeds per variant (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=path, metavar="FOLDER", help="folder for the page (default: <runs>/<recipe>-study-<study>)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print runs, steps and hours, and run nothing")
    parser.add_argument(
        "--step-seconds",
        type=positive_number,
        metavar="S",
        help="seconds of one step, for the hours that --dry-run prints",
    )
    parser.add_argument("--report", action="store_true", help="train nothing; write the page of what is trained so far")
    parser.add_argument(
        "--slurm", action="store_true", help="submit an array with one task per run; then write the page with --report"
    )
    add_slurm_options(parser.add_argument_group("with --slurm"))
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the study; exit code 1 when a cell failed, 75 when a signal stopped it."""
    from alignvlm.cli.imports import import_model
    from alignvlm.studies.cells.execute import StoppedError
    from alignvlm.studies.registry import find_study
    from alignvlm.system.signals import REQUEUE

    study = find_study(arguments.study)
    grid = study.grid(arguments.recipe, arguments.overrides, arguments.seeds)
    folder = arguments.output or Path(grid.base.runs) / f"{grid.base.name}-study-{study.name}"
    if arguments.dry_run:
        from alignvlm.studies.cells.forecast import describe, forecast

        print("\n".join(describe(grid, forecast(grid, arguments.step_seconds))))
        if arguments.slurm:
            print(mask(shlex.join(_array(arguments, grid, grid.cells, folder).command())))
        return 0
    if arguments.slurm:
        return _submit(arguments, grid, folder)
    import_model()
    from alignvlm.studies.run import report_study, run_study

    failed: list[str] = []
    if arguments.report:
        page = report_study(study, grid, folder)
    else:
        try:
            page, failed = run_study(study, grid, folder)
        except StoppedError as stopped:
            print(f"alignvlm: {stopped}", file=sys.stderr)
            return REQUEUE
    trained = sum(cell.is_trained for cell in grid.cells)
    print(f"study {study.name}, {trained} of {len(grid.cells)} runs trained: {page}")
    if failed:
        print(f"alignvlm: {len(failed)} of {len(grid.cells)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _submit(arguments: argparse.Namespace, grid: Grid, folder: Path) -> int:
    """Prepare the data, write the file of runs and submit what is not finished."""
    from alignvlm.studies.cells.execute import unfinished
    from alignvlm.studies.run import match

    _array(arguments, grid, grid.cells, folder)  # refused before the data is prepared
    grid, _ = match(grid)
    cells = unfinished(grid)
    if not cells:
        print(f"all {len(grid.cells)} runs are trained; write the page with --report")
        return 0
    array = _array(arguments, grid, cells, folder)
    command = array.command()
    environment = {"ALIGNVLM_PYTHON": sys.executable}
    with must_write(array.file, "give another folder: --output FOLDER"):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(array.file, array.lines)
    number = submit(command, environment, shlex.join(command))
    print(f"submitted array {number} of {len(cells)} runs; logs: {folder}/slurm-{number}-*.log; afterwards: --report")
    return 0


def _array(arguments: argparse.Namespace, grid: Grid, cells: Sequence[Cell], folder: Path) -> SlurmArray:
    """The array that the options describe. Raises UserError where a run would not fit it."""
    from alignvlm.launch.slurm import SlurmArray

    for override in grid.overrides:
        if mask(override) != override:
            raise UserError(f"override {override!r}: a file of runs is no place for a password; set it as a variable")
    job = slurm_job(arguments, grid.base)
    for cell in grid.of_seed(grid.seeds[0]):
        job.check(cell.recipe)
    runs = [(cell.recipe, [cell.recipe_name, *cell.overrides]) for cell in cells]
    return SlurmArray(job, f"{grid.base.name}-{grid.study}", folder, runs)
