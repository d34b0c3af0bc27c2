"""`alignvlm report`: the HTML report of a run, also of one that is not finished."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "report",
        help="build the HTML report of a run",
        description="One self-contained page with curves, tables and a gallery, from what the run has written so far.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/quickstart")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    from alignvlm.report.report import build_report

    print(f"report {build_report(arguments.run)}")
    return 0
