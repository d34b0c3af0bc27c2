"""`alignvlm export`: a Hugging Face folder from a checkpoint in the middle of a stage."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "export",
        help="make a Hugging Face folder of a checkpoint",
        description="Stages export by themselves at their end; this is for a checkpoint in between.",
    )
    parser.add_argument("checkpoint", type=Path, help="runs/<name>/<n>-<stage>/checkpoints/step-…")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    from alignvlm.errors import UserError
    from alignvlm.training.checkpoints.export import export_checkpoint

    if arguments.output.exists():
        raise UserError(f"{arguments.output} exists already; give another folder")
    export_checkpoint(arguments.checkpoint, arguments.output)
    print(f"wrote {arguments.output}")
    return 0
