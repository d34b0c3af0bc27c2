"""`alignvlm eval`: an exported model on the held-out tasks of a recipe, or on published benchmarks."""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

from alignvlm.cli.arguments import add_overrides, path, positive, processes, word
from alignvlm.cli.evaluation import benchmarks
from alignvlm.system.ranks import ALONE, Ranks

BENCHMARK_MINUTES = 24 * 60.0
"""How long ranks wait for the one that has the longest replies."""


def add_parser(subparsers: Any) -> None:
    """Add `eval` to the command line."""
    parser = subparsers.add_parser(
        "eval",
        help="evaluate an exported model on held-out data or published benchmarks",
        description="Answer the tasks of a recipe's `evaluation` section, or the questions of published benchmarks "
        "(--benchmark docvqa --data FOLDER), by greedy decoding and score the answers. "
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
    parser.add_argument(
        "--recipe", type=word, metavar="RECIPE", help="the recipe with the tasks, for an export folder outside a run"
    )
    parser.add_argument(
        "--stage",
        type=word,
        metavar="STAGE",
        help="the export of this stage instead of the newest (init: before training)",
    )
    parser.add_argument("--task", type=word, action="append", metavar="NAME", help="only this task; may be repeated")
    parser.add_argument(
        "--benchmark", type=word, action="append", metavar="NAME", help="a published benchmark; may be repeated"
    )
    parser.add_argument(
        "--suite", choices=["paper"], help="the nine benchmarks of the paper's Table 2, as far as --data has them"
    )
    parser.add_argument(
        "--data",
        type=path,
        action="append",
        metavar="PATH",
        help="file or folder of the benchmark, in any of its layouts: once for all, once for each, or NAME=PATH",
    )
    parser.add_argument(
        "--flavour",
        type=word,
        metavar="NAME",
        help="whose prompts and metric to use: vlmevalkit, lmms_eval, docowl, official",
    )
    parser.add_argument("--batch-size", type=positive, metavar="N", help="questions of a benchmark per batch and rank")
    parser.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="only the first N samples of each task, or questions of each benchmark",
    )
    parser.add_argument(
        "--processes",
        type=processes,
        default=1,
        metavar="N",
        help="processes to start on this machine (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        type=word,
        metavar="DEVICE",
        help="such as cuda:1 or cpu (default: the GPU of this process, else the CPU)",
    )
    parser.add_argument(
        "--output",
        type=path,
        metavar="FOLDER",
        help="folder for the results (default: `evaluation` or `benchmarks` beside the export)",
    )
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate in this process, or start several that share the samples; rank 0 prints the table."""
    from alignvlm.cli.imports import import_model
    from alignvlm.errors import UserError
    from alignvlm.launch.local import end_with_launcher, is_launched, run_local

    end_with_launcher()
    if arguments.suite and (arguments.benchmark or arguments.flavour):
        raise UserError("--suite names its benchmarks and flavours itself: leave --benchmark and --flavour out")
    published = arguments.benchmark or arguments.suite
    if not published and (arguments.data or arguments.flavour or arguments.batch_size):
        raise UserError("--data, --flavour and --batch-size belong to --benchmark NAME or --suite paper")
    if published and arguments.task:
        raise UserError("--task belongs to a recipe's tasks, --benchmark to published files: give one of them")
    evaluate, timeout_minutes = _prepare_benchmarks(arguments) if published else _prepare_tasks(arguments)
    if arguments.processes > 1 and not is_launched():
        return run_local(_same_command(arguments), arguments.processes)
    import_model()
    if not is_launched():
        evaluate(ALONE)
        return 0
    from alignvlm.training import distributed

    try:
        evaluate(distributed.start(timeout_minutes))
    finally:
        distributed.stop()
    return 0


def _prepare_tasks(arguments: argparse.Namespace) -> tuple[partial[None], float]:
    """What the ranks do, and how many minutes they wait for each other."""
    from alignvlm.errors import UserError
    from alignvlm.evaluation.target import find_target
    from alignvlm.run_folder import evaluation_folder

    recipe, export = find_target(arguments.target, arguments.overrides, arguments.recipe, arguments.stage)
    if not (recipe.evaluation.tasks or recipe.evaluation.text or recipe.evaluation.benchmarks):
        raise UserError(f"recipe {recipe.name!r} has no evaluation.tasks; name at least one held-out source there")
    out = arguments.output or evaluation_folder(export, arguments.limit)
    return partial(_evaluate_tasks, arguments, recipe, export, out), recipe.train.timeout_minutes


def _evaluate_tasks(arguments: argparse.Namespace, recipe: Any, export: Path, out: Path, ranks: Ranks) -> None:
    from alignvlm.evaluation.evaluate import evaluate
    from alignvlm.run_folder import benchmark_folder

    options = {"ranks": ranks, "limit": arguments.limit, "device": arguments.device, "progress": True}
    if recipe.evaluation.tasks or arguments.task:
        results = evaluate(export, recipe, out, tasks=arguments.task, **options)
        if ranks.is_main:
            show(results, out)
    if recipe.evaluation.text and not arguments.task:
        from alignvlm.evaluation.perplexity import measure_texts

        texts = measure_texts(export, recipe, out, **options)
        if ranks.is_main:
            show_texts(texts)
    if recipe.evaluation.benchmarks and not arguments.task:
        from alignvlm.evaluation.benchmarks.job import jobs_of_recipe

        arguments.batch_size = recipe.evaluation.batch_size
        place = out / "benchmarks" if arguments.output else benchmark_folder(export, arguments.limit)
        jobs = ranks.together(jobs_of_recipe, recipe, arguments.limit)
        _evaluate_benchmarks(arguments, export, jobs, place, ranks)


def _prepare_benchmarks(arguments: argparse.Namespace) -> tuple[partial[None], float]:
    from alignvlm.run_folder import benchmark_folder

    export = benchmarks.find_export(arguments)
    jobs = benchmarks.jobs_of(arguments)
    out = arguments.output or benchmark_folder(export, arguments.limit)
    return partial(_evaluate_benchmarks, arguments, export, jobs, out), BENCHMARK_MINUTES


def _evaluate_benchmarks(arguments: argparse.Namespace, export: Path, jobs: Any, out: Path, ranks: Ranks) -> None:
    from alignvlm.evaluation.benchmarks.job import announce
    from alignvlm.evaluation.benchmarks.run import run_benchmarks
    from alignvlm.run_folder import BenchmarkFolder

    if ranks.is_main:
        announce(jobs)
    options = {"batch_size": arguments.batch_size} if arguments.batch_size else {}
    results = run_benchmarks(export, jobs, out, ranks=ranks, device=arguments.device, progress=True, **options)
    if ranks.is_main:
        benchmarks.show(results)
        if arguments.suite:
            print("\n" + BenchmarkFolder(out).paper.read_text(encoding="utf-8"))
        print(f"Replies and results.json: {out}")


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


def show_texts(results: dict[str, Any]) -> None:
    """Print the perplexity of every text."""
    for name, entry in results["texts"].items():
        keys = ("perplexity", "word_perplexity", "bits_per_byte")
        tokens, words, size = (math.inf if entry[key] is None else entry[key] for key in keys)
        print(
            f"{name}: perplexity {tokens:.4g} per token, {words:.4g} per word, {size:.4f} bits per byte "
            f"({entry['documents']:,} documents, {entry['tokens']:,} tokens)"
        )


def _same_command(arguments: argparse.Namespace) -> list[str]:
    """This command line for the processes that `run_local` starts."""
    line = [sys.executable, "-m", "alignvlm", "eval", arguments.target, *arguments.overrides]
    for name in (
        "recipe",
        "stage",
        "limit",
        "device",
        "output",
        "flavour",
        "batch_size",
        "task",
        "benchmark",
        "data",
        "suite",
    ):
        value = getattr(arguments, name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        line += [word for each in values for word in (f"--{name.replace('_', '-')}", str(each))]
    return line
