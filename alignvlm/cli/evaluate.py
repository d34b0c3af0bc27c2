"""`alignvlm eval`: an exported model on the held-out tasks of a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "eval",
        help="evaluate an exported model on held-out data",
        description="Greedy answers to the tasks of a recipe's `evaluation` section. Results that are still valid are "
        "not computed again. Under a launcher (torchrun, DeepSpeed, srun) the samples are shared by all processes.",
    )
    parser.add_argument(
        "target", metavar="RECIPE_or_EXPORT", help="a recipe (the newest stage of its run) or an export folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings to change")
    parser.add_argument("--recipe", help="recipe for an export folder that lies outside its run")
    parser.add_argument("--stage", help="a stage's export instead of the newest (init: before training)")
    parser.add_argument("--task", action="append", metavar="NAME", help="only this task; may be given again")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N samples of each task")
    parser.add_argument("--processes", type=int, default=1, metavar="P", help="processes to start on this machine")
    parser.add_argument("--device", help="such as cuda:1 or cpu; default: the GPU of this process, if any")
    parser.add_argument("--out", type=Path, help="folder of the results; default: `evaluation` beside the export")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    from alignvlm.errors import UserError
    from alignvlm.evaluation.evaluate import evaluate
    from alignvlm.launch.local import is_launched, run_local

    if arguments.limit is not None and arguments.limit < 1:
        raise UserError(f"--limit {arguments.limit}: at least 1")
    recipe, export = find_model(arguments)
    if not recipe.evaluation.tasks:
        raise UserError(f"recipe {recipe.name!r} has no evaluation.tasks; name at least one held-out source there")
    if arguments.processes > 1 and not is_launched():
        return run_local(_again(arguments), arguments.processes)
    out = arguments.out or export.parent / ("evaluation" if not arguments.limit else f"evaluation-{arguments.limit}")
    options: dict[str, Any] = {"tasks": arguments.task, "limit": arguments.limit, "device": arguments.device}
    if not is_launched():
        show(evaluate(export, recipe, out, progress=True, **options), out)
        return 0
    from alignvlm.training import distributed

    world = distributed.start(recipe.train.timeout_minutes)
    try:
        options |= {"rank": world.rank, "world_size": world.size, "barrier": world.barrier}
        results = evaluate(export, recipe, out, progress=True, **options)
        if world.is_main:
            show(results, out)
    finally:
        distributed.stop()
    return 0


def find_model(arguments: argparse.Namespace) -> tuple[Recipe, Path]:
    """The recipe that names the tasks, and the export folder.

    Raises:
        UserError: an export without a recipe, a run without an export, or an unknown stage.
    """
    from alignvlm.config import load_recipe
    from alignvlm.errors import UserError
    from alignvlm.run_folder import Run, run_of_export
    from data_pipeline.errors import nearest

    export = Path(arguments.target)
    if export.is_dir():
        resolved = run_of_export(export).config
        if not (export / "config.json").is_file():
            raise UserError(f"{export} is no export folder (no config.json); give runs/<name>/<n>-<stage>/export")
        if not arguments.recipe and not resolved.is_file():
            raise UserError(f"{export} lies in no run: say which recipe's tasks with --recipe")
        return load_recipe(arguments.recipe or str(resolved), arguments.overrides), export
    recipe = load_recipe(arguments.target, arguments.overrides)
    run = Run(recipe)
    if arguments.stage is None:
        newest = run.newest_export()
        if newest is None:
            raise UserError(f"{run.folder.path} has no export yet; train it first: alignvlm train {arguments.target}")
        return recipe, newest
    folders = {folder.name: folder for folder in run.stage_folders()}
    if arguments.stage not in folders:
        raise UserError(f"recipe {recipe.name!r} has no stage {arguments.stage!r}: {nearest(arguments.stage, folders)}")
    folder = folders[arguments.stage]
    if not folder.has_export:
        raise UserError(f"stage {arguments.stage!r} has no export yet ({folder.export})")
    return recipe, folder.export


def show(results: dict[str, Any], out: Path) -> None:
    """The table that people read, and where the files are."""
    from rich.console import Console
    from rich.table import Table

    from alignvlm.evaluation.scores import metrics_of

    metrics = {
        name: metric["title"] for entry in results["tasks"].values() for name, metric in metrics_of(entry).items()
    }
    table = Table(title=str(results["model"]), title_justify="left")
    table.add_column("Task")
    for title in ("Items", *metrics.values(), "Baseline"):
        table.add_column(title, justify="right")
    for task, entry in results["tasks"].items():
        scores = [f"{entry[name]:.3f}" if name in entry else "–" for name in metrics]
        table.add_row(task, f"{entry['items']:,}", *scores, f"{entry['baseline']:.3f}")
    console = Console()
    console.print(table)
    console.print("Baseline: always giving the most frequent answer, by the task's first metric")
    console.print(f"predictions and results.json: {out}", soft_wrap=True)


def _again(arguments: argparse.Namespace) -> list[str]:
    """This command line for the processes that `run_local` starts."""
    line = [sys.executable, "-m", "alignvlm", "eval", arguments.target, *arguments.overrides]
    for name in ("recipe", "stage", "limit", "device", "out"):
        value = getattr(arguments, name)
        line += [f"--{name}", str(value)] if value is not None else []
    return line + [word for task in arguments.task or () for word in ("--task", task)]
