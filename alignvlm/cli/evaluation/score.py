"""`alignvlm score`: scores without a model, of stored replies or of a file of reference cases."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.cli.arguments import file, word

if TYPE_CHECKING:
    from alignvlm.evaluation.benchmarks.base import Benchmark


def add_parser(subparsers: Any) -> None:
    """Add `score` to the command line."""
    parser = subparsers.add_parser(
        "score",
        help="score stored replies without a model",
        description="Score the replies that `alignvlm eval --benchmark` has stored, also by another flavour's metric; "
        "or, with --vectors, compare the metrics of this package with a file of cases that another evaluator has "
        'scored, {metric: [{"prediction": …, "references": …, "expected": …}]}: every case that differs is printed, '
        "and the exit code is 0 when there is none, else 1.",
    )
    parser.add_argument("replies", type=file, nargs="?", metavar="FILE", help="stored replies, `<benchmark>.jsonl`")
    parser.add_argument(
        "--benchmark", type=word, metavar="NAME", help="benchmark that was asked (default: the file's name)"
    )
    parser.add_argument(
        "--flavour",
        type=word,
        metavar="NAME",
        help="whose metric to use (default: that of the evaluation, else the benchmark's first)",
    )
    parser.add_argument("--judge", type=file, metavar="FILE", help='a judge\'s scores as JSON, {"id": score} (mmvet)')
    parser.add_argument("--vectors", type=file, metavar="FILE", help="JSON file of reference cases")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Score the one file that is given."""
    from alignvlm.errors import UserError

    if (arguments.replies is None) == (arguments.vectors is None):
        raise UserError("give either a file of stored replies, or --vectors FILE; see alignvlm score --help")
    if arguments.vectors is not None:
        return _compare(arguments.vectors)
    _score(arguments.replies, arguments.benchmark or arguments.replies.stem, arguments.flavour, arguments.judge)
    return 0


def _score(path: Path, name: str, flavour: str | None, judge: Path | None) -> None:
    from alignvlm.cli.evaluation.benchmarks import show
    from alignvlm.evaluation.benchmarks import find_benchmark
    from alignvlm.evaluation.benchmarks.scoring import add_judge, read_replies, score_rows

    benchmark = find_benchmark(name)
    flavour = benchmark.flavour(flavour or _flavour_of(path, benchmark))
    rows = read_replies(path) if judge is None else add_judge(benchmark, read_replies(path), judge)
    entry = score_rows(benchmark, rows, flavour)
    show({"benchmarks": {name: entry | {"title": benchmark.title, "flavour": flavour}}}, title=str(path))


def _flavour_of(path: Path, benchmark: Benchmark) -> str | None:
    """The flavour in which `alignvlm eval` asked, by results.json beside the file; None for a file from elsewhere.

    Raises:
        UserError: results.json is damaged.
    """
    from alignvlm.errors import UserError
    from alignvlm.evaluation.benchmarks.run import read_results
    from alignvlm.run_folder import BenchmarkFolder

    folder, name = BenchmarkFolder(path.parent), benchmark.name
    if path != folder.replies(name) or not folder.results.exists():
        return None
    known = read_results(folder)
    if not known and len(benchmark.flavours) > 1:
        names = ", ".join(benchmark.flavours)
        raise UserError(f"{folder.results} does not say in whose flavour {name} was asked: give --flavour ({names})")
    entries = known.get("benchmarks", {})
    return entries[name]["flavour"] if name in entries else None


def _compare(path: Path) -> int:
    """Print every case that differs, and how many agree."""
    from alignvlm.metrics.vectors import differences, read_vectors

    table = read_vectors(path)
    total = sum(map(len, table.values()))
    different = 0
    for difference in differences(table):
        different += 1
        print(difference)
    print(f"{total - different} of {total}")
    return int(different > 0)
