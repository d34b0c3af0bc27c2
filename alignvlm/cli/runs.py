"""`alignvlm report|goodput|export|track`: what is made from the files of a run, finished or not."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from alignvlm.cli.arguments import add_recipe, path, positive, word

if TYPE_CHECKING:
    from alignvlm.exports import Push


def add_parser(subparsers: Any) -> None:
    """Add `report`, `goodput`, `export` and `track` to the command line."""
    report = subparsers.add_parser(
        "report",
        help="build the HTML report of a run",
        description="Write one self-contained page with results, curves and a gallery, from the run's files so far.",
    )
    report.add_argument("run", type=path, metavar="RUN", help="run folder, such as runs/quickstart")
    report.set_defaults(handler=run_report)

    goodput = subparsers.add_parser(
        "goodput",
        help="say where the wall clock of a run went",
        description="Split the time since the run's first start into steps that count, waiting for data, start-up, "
        "steps taken again after a restart, checkpoints, evaluation and waiting between attempts. The run may be "
        "training. docs/goodput.md explains the parts.",
    )
    goodput.add_argument("run", type=path, metavar="RUN", help="run folder, such as runs/quickstart")
    goodput.add_argument("--json", action="store_true", help="print JSON: all times in seconds")
    goodput.add_argument(
        "--failure-every",
        type=positive,
        metavar="MINUTES",
        help="also print the ratio for a failure every so many minutes, each as costly as those of this run",
    )
    goodput.set_defaults(handler=run_goodput)

    export = subparsers.add_parser(
        "export",
        help="convert a checkpoint into a Hugging Face folder",
        description="Convert a checkpoint into a Hugging Face folder. Every stage does this at its end; this command "
        "is for the checkpoints before, for the best one, and for the mean of the last ones. With --push, the folder "
        "goes to the Hugging Face Hub as well; that of a stage does so without another copy: leave OUTPUT out.",
    )
    export.add_argument(
        "checkpoint",
        type=path,
        metavar="CHECKPOINT",
        help="runs/<name>/<n>-<stage>/checkpoints/step-…; with --best or --average also a run or a stage; "
        "with --push and no OUTPUT runs/<name>/<n>-<stage>/export",
    )
    export.add_argument("output", type=path, nargs="?", metavar="OUTPUT", help="new folder")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--best", action="store_true", help="take the checkpoint that is best by checkpoint.keep_best")
    which.add_argument(
        "--average",
        type=positive,
        metavar="N",
        help="take the mean of the weights of the last N checkpoints of a stage",
    )
    export.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="type of the weights (default: the run's precision)"
    )
    export.add_argument("--push", type=word, metavar="ORG/NAME", help="upload the folder to this repository of the Hub")
    export.add_argument("--private", action="store_true", help="with --push: create it as a private repository")
    export.add_argument("--revision", type=word, metavar="BRANCH", help="with --push: to this branch (default: main)")
    export.add_argument("--dry-run", action="store_true", help="with --push: list what would go; changes nothing")
    export.set_defaults(handler=run_export)

    track = subparsers.add_parser(
        "track",
        help="bring MLflow and the other trackers of a run up to date",
        description="Upload to MLflow, and to the trackers that tracking.also names, what they lack of a run: what it "
        "could not deliver while a server was away, or all of it.",
    )
    add_recipe(track, "runs=/data/runs")
    track.set_defaults(handler=run_track)


def run_report(args: argparse.Namespace) -> int:
    """Build the page and print its path."""
    from alignvlm.report.report import build_report

    print(f"report {build_report(args.run)}")
    return 0


def run_goodput(args: argparse.Namespace) -> int:
    """Print the table, or JSON."""
    import json

    from alignvlm.report.failures import project
    from alignvlm.report.goodput import read_goodput, table

    found = read_goodput(args.run)
    projected = project(found, 60 * args.failure_every) if args.failure_every else None
    if args.json:
        print(json.dumps(found.to_json() | ({"projected": projected.to_json()} if projected else {}), indent=2))
    else:
        print(table(found) + (f"\n\n{projected}" if projected else ""))
    return 0


def run_export(args: argparse.Namespace) -> int:
    """Export the checkpoint that was asked for, or the mean of several; push the folder where that is asked for."""
    from alignvlm.errors import UserError
    from alignvlm.exports import Push, check_token

    if not args.push and (args.private or args.revision or args.dry_run):
        raise UserError("--private, --revision and --dry-run belong to --push ORG/NAME")
    converts = args.output is not None or not args.push
    push = Push(args.output or args.checkpoint, args.push, args.private, args.revision) if args.push else None
    if converts and args.dry_run:
        raise UserError("--dry-run lists an export that is there: leave OUTPUT out and give its folder")
    if converts:
        if push:
            check_token()  # before the work
        _convert(args)
    if push and args.dry_run:
        _list_files(push)
    elif push:
        print(f"pushed {len(push.files)} files to {push.send()}")
    return 0


def _list_files(push: Push) -> None:
    """Print what would go to the Hub."""
    from alignvlm.exports import check_export

    check_export(push.folder)
    for name, size in push.files.items():
        print(f"{size:>15,}  {name}")
    kind = " (created as private)" if push.private else ""
    print(f"{push.size:>15,}  bytes in {len(push.files)} files would go to {push.target}{kind}; nothing was sent")


def _convert(args: argparse.Namespace) -> None:
    """Write the folder of the checkpoint that was asked for, or of the mean of several, and say which."""
    from alignvlm.best import best_checkpoint, last_checkpoints
    from alignvlm.cli.imports import import_model
    from alignvlm.errors import UserError

    if args.output is None:
        raise UserError(f"alignvlm export {args.checkpoint}: give the new folder as second argument")
    if args.output.exists():
        raise UserError(f"{args.output} already exists; give another folder")
    checkpoints = [args.checkpoint]
    if args.best:
        name, best = best_checkpoint(args.checkpoint)
        checkpoints = [best.folder]
        print(f"best: {best.folder} ({name} {best.score:.4g})")
    elif args.average:
        checkpoints = last_checkpoints(args.checkpoint, args.average)
        names = ", ".join(checkpoint.name for checkpoint in checkpoints)
        print(f"mean of {names} in {checkpoints[0].parent}")
    import_model()
    from alignvlm.training.checkpoints.export import export_checkpoints

    export_checkpoints(checkpoints, args.output, args.dtype)
    print(f"wrote {args.output}")


def run_track(args: argparse.Namespace) -> int:
    """Upload, and print where the run is found in every tracker."""
    from alignvlm.config import load_recipe
    from alignvlm.run_folder import Run
    from alignvlm.training.tracking.upload import upload

    run = Run(load_recipe(args.recipe, args.overrides))
    for place in upload(run):
        print(f"{run.folder.path} is up to date at {place}")
    return 0
