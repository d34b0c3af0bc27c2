"""`alignvlm study`: train the variants of a recipe that answer a question, and write one page that compares them."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from alignvlm.cli.arguments import add_recipe, path, positive, positive_number, word


def add_parser(subparsers: Any) -> None:
    """Add `study` to the command line."""
    from alignvlm.studies.registry import STUDIES

    parser = subparsers.add_parser(
        "study",
        help="compare variants of a recipe over several seeds",
        description="Train every variant of a study with every seed as an ordinary run in the recipe's folder of runs, "
        "one after the other on this machine, and write a page, results.json and table.md. What is trained is not "
        "trained again: the same command resumes.",
    )
    parser.add_argument("study", type=word, metavar="STUDY", help=f"one of {', '.join(STUDIES)}")
    add_recipe(parser, "stages.joint.max_steps=500")
    parser.add_argument(
        "--seeds", type=positive, default=1, metavar="N", help="seeds per variant (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=path, metavar="FOLDER", help="for the page (default: <runs>/<recipe>-study-<study>)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print runs, steps and hours, and run nothing")
    parser.add_argument(
        "--step-seconds", type=positive_number, metavar="S", help="of one step, for the hours that --dry-run prints"
    )
    parser.add_argument("--report", action="store_true", help="train nothing; write the page of what is trained so far")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the study; exit code 1 when a cell failed, 75 when a signal stopped it."""
    from alignvlm.studies.cells.execute import StoppedError
    from alignvlm.studies.cells.grid import make_grid
    from alignvlm.studies.registry import find_study
    from alignvlm.system.signals import REQUEUE

    study = find_study(arguments.study)
    grid = make_grid(study, arguments.recipe, arguments.overrides, arguments.seeds)
    if arguments.dry_run:
        from alignvlm.studies.cells.forecast import describe, forecast

        print("\n".join(describe(grid, forecast(grid, arguments.step_seconds))))
        return 0
    from alignvlm.studies.run import report_study, run_study

    folder = arguments.output or Path(grid.base.runs) / f"{grid.base.name}-study-{study.name}"
    failed: list[str] = []
    if arguments.report:
        page = report_study(grid, folder)
    else:
        try:
            page, failed = run_study(grid, folder)
        except StoppedError as stopped:
            print(f"alignvlm: {stopped}", file=sys.stderr)
            return REQUEUE
    print(f"study {study.name}: {page}")
    if failed:
        print(f"alignvlm: {len(failed)} of {len(grid.cells)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
