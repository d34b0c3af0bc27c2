"""`alignvlm plan RECIPE`: parameters, memory, FLOPs and hours of a run before it runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignvlm.estimates import RunPlan


def add_parser(subparsers: Any) -> None:
    """Add `plan` to the command line."""
    parser = subparsers.add_parser("plan", help="parameters, memory, FLOPs and hours of a recipe, before it runs")
    parser.add_argument("recipe", help="name or path")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example train.deepspeed=zero2")
    parser.add_argument("--world-size", type=int, help="GPUs (default: the recipe's train.processes)")
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="GiB of one GPU (default: %(default)g)")
    parser.add_argument("--mfu", type=float, default=0.4, help="model FLOPs utilisation (default: %(default)g)")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="dense bf16 peak of one GPU (default: %(default)g, H100 SXM)"
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.set_defaults(handler=run_plan)


def run_plan(args: argparse.Namespace) -> int:
    """Print the plan; exit code 1 when something does not fit."""
    from alignvlm.config import load_recipe
    from alignvlm.estimates import plan_run

    recipe = load_recipe(args.recipe, args.overrides)
    world_size = recipe.train.processes if args.world_size is None else args.world_size
    plan = plan_run(recipe, world_size, gpu_memory=args.gpu_memory, mfu=args.mfu, peak_tflops=args.peak_tflops)
    if args.json:
        import json

        print(json.dumps(plan.to_dict(), indent=2))
    else:
        _print(plan)
    return 0 if plan.fits else 1


def _print(plan: RunPlan) -> None:
    from rich.console import Console

    from alignvlm.estimates.tables import render

    console = Console()
    for item in render(plan):
        console.print(item)
