"""What `alignvlm eval` does with `--benchmark` and `--data`, and the table of benchmark scores."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignvlm.errors import UserError

if TYPE_CHECKING:
    from alignvlm.evaluation.benchmarks.run import Job


def jobs_of(arguments: argparse.Namespace) -> list[Job]:
    """The benchmarks that the command line names, with their files opened.

    Raises:
        UserError: `--data` does not fit `--benchmark`, or a benchmark's files cannot be used.
    """
    from alignvlm.evaluation.benchmarks.run import Job

    names, data = arguments.benchmark, arguments.data or []
    if len(data) not in (1, len(names)):
        raise UserError(f"{len(names)} benchmarks and {len(data)} times --data: give one for all, or one for each")
    places = data if len(data) == len(names) else data * len(names)
    return [Job.of(name, place, arguments.flavour, arguments.limit) for name, place in zip(names, places, strict=True)]


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
