"""`alignvlm estimate RECIPE`: parameters, memory, FLOPs and hours of a run before it runs."""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING, Any

from alignvlm.cli.arguments import add_recipe, fraction, positive, positive_number
from alignvlm.errors import UserError

if TYPE_CHECKING:
    from alignvlm.estimates import RunEstimate


def add_parser(subparsers: Any) -> None:
    """Add `estimate` to the command line, and `plan`, its former name, which only says so."""
    parser = subparsers.add_parser("estimate", help="parameters, memory, FLOPs and hours of a recipe, before it runs")
    add_recipe(parser, "train.deepspeed=zero2")
    parser.add_argument("--world-size", type=positive, metavar="N", help="GPUs (default: the recipe's train.processes)")
    parser.add_argument(
        "--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs of a host (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu-memory", type=positive_number, default=80.0, metavar="GIB", help="GiB of one GPU (default: %(default)g)"
    )
    parser.add_argument(
        "--mfu", type=fraction, default=0.4, metavar="SHARE", help="model FLOPs utilisation (default: %(default)g)"
    )
    parser.add_argument(
        "--peak-tflops",
        type=positive_number,
        default=989.0,
        metavar="TFLOPS",
        help="dense bf16 peak of one GPU (default: %(default)g, H100 SXM)",
    )
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON")
    parser.set_defaults(handler=run_estimate)

    former = subparsers.add_parser("plan", add_help=False, prefix_chars="\0")  # takes whatever it is given
    former.add_argument("arguments", nargs="*")
    former.set_defaults(handler=refuse_plan)


def run_estimate(args: argparse.Namespace) -> int:
    """Print the estimate; exit code 1 when something does not fit."""
    from alignvlm.cli.imports import import_model
    from alignvlm.config import load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    import_model()
    from alignvlm.estimates import estimate_run

    world_size = recipe.train.processes if args.world_size is None else args.world_size
    estimate = estimate_run(
        recipe, world_size, gpus_per_node=args.gpus_per_node, gpu_memory=args.gpu_memory, mfu=args.mfu,
        peak_tflops=args.peak_tflops,
    )  # fmt: skip
    if args.json:
        from data_pipeline.files import to_json

        print(to_json(estimate.to_dict(), indent=2))
    else:
        _print(estimate)
    return 0 if estimate.fits else 1


def refuse_plan(args: argparse.Namespace) -> int:
    """Say which command to type instead."""
    command = shlex.join(["alignvlm", "estimate", *args.arguments])
    raise UserError(f"alignvlm plan is now {command} (the order of the data is alignvlm data plan)")


def _print(estimate: RunEstimate) -> None:
    from rich.console import Console

    from alignvlm.estimates.tables import render

    console = Console()
    for item in render(estimate):
        console.print(item)
