"""`alignvlm score`: scores without a model, of a file of reference cases."""

from __future__ import annotations

import argparse
from typing import Any

from alignvlm.cli.arguments import file


def add_parser(subparsers: Any) -> None:
    """Add `score` to the command line."""
    parser = subparsers.add_parser(
        "score",
        help="score stored replies without a model",
        description="Compare the metrics of this package with a file of cases that another evaluator has scored: "
        '{metric: [{"prediction": …, "references": …, "expected": …}]}. Every case that differs is printed; the exit '
        "code is 0 when there is none, else 1.",
    )
    parser.add_argument("--vectors", type=file, metavar="FILE", required=True, help="JSON file of reference cases")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print every case that differs, and how many agree."""
    from alignvlm.metrics.vectors import differences, read_vectors

    table = read_vectors(arguments.vectors)
    total = sum(map(len, table.values()))
    different = 0
    for difference in differences(table):
        different += 1
        print(difference)
    print(f"{total - different} of {total}")
    return int(different > 0)
