"""`alignvlm data plan|diff|show`: the order of the data before training, printed, compared and drawn."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alignvlm.cli.arguments import add_recipe, count, path, positive, positive_number, word


def add_parser(actions: Any) -> None:
    """Add `plan`, `diff` and `show` to the actions of `data`."""
    plan = actions.add_parser("plan", help="print steps, mixture, fill and first batches of a recipe's stages")
    add_recipe(plan, "stages.joint.sequence_length=4096")
    plan.add_argument("--stage", type=word, metavar="STAGE", help="only this stage")
    plan.add_argument(
        "--world-size", type=positive, metavar="N", help="also check batch sizes and balance for this number of ranks"
    )
    plan.add_argument(
        "--step-seconds",
        type=positive_number,
        metavar="S",
        help="seconds that a step takes: also print requests and bytes per second of object stores",
    )
    plan.add_argument("--json", action="store_true", help="print JSON, which `alignvlm data diff` reads")
    plan.set_defaults(handler=run_plan)

    diff = actions.add_parser("diff", help="compare two plans; exit code 1 when they differ")
    diff.add_argument("old", type=word, metavar="OLD", help="recipe, or a file written by `alignvlm data plan --json`")
    diff.add_argument("new", type=word, metavar="NEW", help="recipe, or a file written by `alignvlm data plan --json`")
    diff.set_defaults(handler=run_diff)

    show = actions.add_parser("show", help="draw the packs of one step as HTML: images, tokens, labels")
    add_recipe(show, "stages.joint.sequence_length=4096")
    show.add_argument("--stage", type=word, metavar="STAGE", help="default: the first stage")
    show.add_argument(
        "--step", type=count, default=0, metavar="N", help="optimizer step, from 0 (default: %(default)s)"
    )
    show.add_argument(
        "--packs", type=positive, default=4, metavar="N", help="number of packs to draw (default: %(default)s)"
    )
    show.add_argument("--output", type=path, metavar="FILE", help="HTML file (default: <recipe>-<stage>-<step>.html)")
    show.set_defaults(handler=run_show)


def run_plan(args: argparse.Namespace) -> int:
    """Print the plan of one or all stages; shards and sample lengths that are missing are made first."""
    from alignvlm.cli.imports import import_model
    from alignvlm.config import load_recipe
    from alignvlm.progress import data_progress
    from alignvlm.stage_data import find_stage, plan_summaries
    from data_pipeline.files import to_json
    from data_pipeline.loading import traffic
    from data_pipeline.order.summary import describe

    recipe = load_recipe(args.recipe, args.overrides)
    stages = [find_stage(recipe, args.stage)] if args.stage else list(recipe.stages.values())
    import_model()
    plans = plan_summaries(recipe, stages, args.world_size, data_progress, args.step_seconds)
    if args.json:
        print(to_json(plans, indent=1))
    else:
        for name, plan in plans["stages"].items():
            print("\n".join(describe(name, plan)))
            if name in plans.get("traffic", {}):
                print(traffic.describe(plans["traffic"][name]))
    return 0


def run_diff(args: argparse.Namespace) -> int:
    """Exit code 1 when the plans differ."""
    from alignvlm.progress import data_progress
    from alignvlm.stage_data import saved_or_new_plans
    from data_pipeline.order.summary import diff_plans

    old, new = (saved_or_new_plans(target, data_progress) for target in (args.old, args.new))
    for plans in (old, new):
        plans.pop("traffic", None)  # says where the data lies, not in which order it is read
    lines = diff_plans(old, new)
    print("\n".join(lines) if lines else "the plans are the same")
    return 1 if lines else 0


def run_show(args: argparse.Namespace) -> int:
    """Write the page of one step's batch and print its path."""
    from alignvlm.cli.imports import import_model
    from alignvlm.config import load_recipe
    from alignvlm.progress import data_progress
    from alignvlm.stage_data import batch_page, find_stage

    recipe = load_recipe(args.recipe, args.overrides)
    stage = find_stage(recipe, args.stage)
    import_model()
    page = batch_page(recipe, stage, args.step, args.packs, data_progress)
    out = args.output or Path(f"{recipe.name}-{stage.name}-{args.step}.html")
    out.write_text(page, encoding="utf-8", errors="backslashreplace")
    print(out)
    return 0
