"""`alignvlm eval`: an exported model on the held-out tasks of a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from alignvlm.cli.arguments import add_overrides, path, positive, processes, word


def add_parser(subparsers: Any) -> None:
    """Add `eval` to the command line."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate an exported model on held-out data",
        description="Answer the tasks of a recipe's `evaluation` section by greedy decoding and score the answers. "
        "Results that are still valid are not computed again. Under a launcher (torchrun, DeepSpeed, srun) all "
        "processes share the samples.",
    )
    parser.add_argument(
        "target",
        type=word,
        metavar="RECIPE_or_EXPORT",
        help="a recipe (the newest export of its run), or an export folder",
    )
    add_overrides(parser, "settings of the recipe to change")
    parser.add_argument("--recipe", type=word, help="the recipe with the tasks, for an export folder outside a run")
    parser.add_argument(
        "--stage", type=word, help="the export of this stage instead of the newest (init: before training)"
    )
    parser.add_argument("--task", type=word, action="append", metavar="NAME", help="only this task; may be repeated")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N samples of each task")
    parser.add_argument(
        "--processes", type=processes, default=1, metavar="P", help="processes to start on this machine"
    )
    parser.add_argument(
        "--device", type=word, help="such as cuda:1 or cpu (default: the GPU of this process, else the CPU)"
    )
    parser.add_argument("--out", type=path, help="folder for the results (default: `evaluation` beside the export)")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate in this process, or start several that share the samples; rank 0 prints the table."""
    from alignvlm.errors import UserError
    from alignvlm.evaluation.evaluate import evaluate
    from alignvlm.evaluation.target import find_target
    from alignvlm.launch.local import end_with_launcher, is_launched, run_local
    from alignvlm.run_folder import evaluation_folder

    end_with_launcher()
    recipe, export = find_target(arguments.target, arguments.overrides, arguments.recipe, arguments.stage)
    if not recipe.evaluation.tasks:
        raise UserError(f"recipe {recipe.name!r} has no evaluation.tasks; name at least one held-out source there")
    if arguments.processes > 1 and not is_launched():
        return run_local(_same_command(arguments), arguments.processes)
    out = arguments.out or evaluation_folder(export, arguments.limit)
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


def show(results: dict[str, Any], out: Path) -> None:
    """Print the scores as a table, and where the files are."""
    from rich.console import Console
    from rich.table import Table

    from alignvlm.evaluation.scores import metrics_of

    entries = results["tasks"].values()
    metrics = {name: metric["title"] for entry in entries for name, metric in metrics_of(entry).items()}
    table = Table(title=str(results["model"]), title_justify="left")
    table.add_column("Task")
    for title in ("Items", *metrics.values(), "Baseline"):
        table.add_column(title, justify="right")
    for task, entry in results["tasks"].items():
        scores = [f"{entry[name]:.3f}" if name in entry else "–" for name in metrics]
        table.add_row(task, f"{entry['items']:,}", *scores, f"{entry['baseline']:.3f}")
    console = Console()
    console.print(table)
    console.print("Baseline: the most frequent answer given to every item, scored by the task's first metric")
    console.print(f"Predictions and results.json: {out}", soft_wrap=True)


def _same_command(arguments: argparse.Namespace) -> list[str]:
    """This command line for the processes that `run_local` starts."""
    line = [sys.executable, "-m", "alignvlm", "eval", arguments.target, *arguments.overrides]
    for name in ("recipe", "stage", "limit", "device", "out"):
        value = getattr(arguments, name)
        line += [f"--{name}", str(value)] if value is not None else []
    return line + [word for task in arguments.task or () for word in ("--task", task)]
