"""What `alignvlm eval` does with `--benchmark` and `--data`, and the table of benchmark scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.errors import UserError

if TYPE_CHECKING:
    from alignvlm.evaluation.benchmarks.job import Job


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """The benchmarks that the command line names, with their files opened.

    Raises:
        UserError: `--data` does not fit `--benchmark`, or a benchmark's files cannot be used.
    """
    from alignvlm.evaluation.benchmarks.job import Job
    from alignvlm.evaluation.benchmarks.suite import COLUMNS

    named, places = _places(arguments.data or [])
    names = list(COLUMNS) if arguments.suite else arguments.benchmark
    for name, path in named.items():
        if name not in names:
            asked = ", ".join(names)
            raise UserError(f"--data {name}={path}: {name} is none of the benchmarks that are asked: {asked}")
    if arguments.suite:
        return _jobs_of_suite(arguments, named, places)
    if not arguments.data:
        raise UserError(f"--benchmark {names[0]} needs its files: --data PATH, a file or folder of the benchmark")
    if len(set(names)) < len(names):
        raise UserError(f"--benchmark {', '.join(names)}: one is given twice; results are kept by its name")
    unnamed = [name for name in names if name not in named]
    if len(places) not in (1, len(unnamed)) or (places and not unnamed):
        raise UserError(
            f"{len(names)} benchmarks and {len(arguments.data)} times --data: give one for all, or one for each"
        )
    each = places if len(places) == len(unnamed) else places * len(unnamed)
    found = named | dict(zip(unnamed, each, strict=True))
    return [Job.of(name, found[name], arguments.flavour, arguments.limit) for name in names]


def _jobs_of_suite(arguments: argparse.Namespace, named: dict[str, Path], places: list[Path]) -> list[Job]:
    """The benchmarks of the paper's table whose data is given, or is found in a folder; the others are said."""
    from alignvlm.evaluation.benchmarks.job import Job
    from alignvlm.evaluation.benchmarks.suite import COLUMNS

    jobs: list[Job] = []
    for name in COLUMNS:
        if name in named:
            jobs.append(Job.of(name, named[name], None, arguments.limit))
            continue
        reasons = []
        for place in [each for root in places for each in (root / name, root) if each.exists()]:
            try:
                jobs.append(Job.of(name, place, None, arguments.limit))
                break
            except UserError as error:
                reasons.append(str(error))
        else:
            why = reasons[0] if reasons else f"no folder of this name; give --data {name}=PATH"
            print(f"{name} is left out: {why}")
    if not jobs:
        raise UserError("--suite paper found no data: give a folder with one folder per benchmark, or --data NAME=PATH")
    return jobs


def _places(data: list[Path]) -> tuple[dict[str, Path], list[Path]]:
    """(benchmark -> its `NAME=PATH`, the other paths)."""
    from alignvlm.evaluation.benchmarks import benchmark_names

    named, places = {}, []
    for path in data:
        name, mark, rest = str(path).partition("=")
        if mark and rest and name in benchmark_names():
            named[name] = Path(rest)
        else:
            places.append(path)
    return named, places


def find_export(arguments: argparse.Namespace) -> Path:
    """The export folder that the command names, itself or by its recipe. Raises UserError when there is none."""
    from alignvlm.evaluation.target import find_target
    from alignvlm.exports import check_export

    if Path(arguments.target).is_dir():
        check_export(Path(arguments.target))
        return Path(arguments.target)
    return find_target(arguments.target, arguments.overrides, arguments.recipe, arguments.stage)[1]


def show(results: dict[str, Any], title: str | None = None) -> None:
    """Print headline scores with their intervals, all other scores, and what must be known about them."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title or str(results["model"]), title_justify="left")
    table.add_column("Benchmark")
    for name in ("Items", "Score", "95 % interval", "Flavour", "Replies/s"):
        table.add_column(name, justify="right")
    console, entries = Console(), results["benchmarks"].values()
    for entry in entries:
        low, high = entry["interval"]
        score = "not scored" if entry["score"] is None else f"{entry['score']:.2f}"
        speed = entry.get("replies_per_second")
        interval = "–" if entry["score"] is None else f"{low:.2f} – {high:.2f}"
        table.add_row(
            entry["title"], f"{entry['items']:,}", score, interval, entry["flavour"],
            "–" if speed is None else f"{speed:.1f}",
        )  # fmt: skip
    console.print(table)
    for entry in entries:
        others = [f"{name} {value:.2f}" for name, value in entry["scores"].items() if name != entry["headline"]]
        if others:
            console.print(f"{entry['title']}: {entry['headline']} above; {', '.join(others)}", soft_wrap=True)
        for note in entry["notes"]:
            console.print(f"{entry['title']}: {note}", soft_wrap=True)
