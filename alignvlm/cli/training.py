"""`alignvlm train`: run a recipe to its end; the same command resumes it."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from alignvlm.cli.arguments import add_recipe
from alignvlm.system.ranks import is_rank_0


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a recipe, or resume it",
        description="Prepare the data, train all stages, evaluate and report. A run that stopped resumes from its "
        "newest valid checkpoint.",
    )
    add_recipe(parser)
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and run nothing")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    from alignvlm.config import load_recipe
    from alignvlm.launch.local import end_with_launcher, is_launched, run_local
    from alignvlm.run_folder import Run
    from alignvlm.system.timeline import STARTED, job_start

    end_with_launcher()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.dry_run:
        check_start(recipe)
        return dry_run(recipe)
    if not is_launched() and Run(recipe).folder.seal.exists():
        from alignvlm.training.finished import is_finished  # 0.2 s of CPU time, which a restart need not wait for

        if is_finished(Run(recipe)):
            print_locations(recipe)
            return 0
    if not is_launched():
        from alignvlm.checks import check_data

        check_start(recipe)
        check_data(recipe)
        print(describe_run(recipe), flush=True)
    if not is_launched() and recipe.train.processes > 1:
        os.environ[STARTED] = str(job_start())
        import alignvlm.training  # noqa: F401  (says what is not installed before processes start)

        command = [sys.executable, "-m", "alignvlm", "train", arguments.recipe, *arguments.overrides]
        return run_local(command, recipe.train.processes)
    from alignvlm.system.imports import importing
    from alignvlm.system.monitor.start import Monitor

    heart = Monitor(recipe.resilience.limits).__enter__()  # until this process has ended
    with importing():
        from alignvlm.training.run import train

    code = train(recipe, began=job_start(), heart=heart)
    if code == 0 and is_rank_0():
        print_locations(recipe)
    return code


def check_start(recipe: Any) -> None:
    """Refuse what can be told before processes start and import torch. Raises UserError."""
    from alignvlm.checks import check_files
    from alignvlm.launch import check_world
    from alignvlm.run_folder import Run

    Run(recipe).check_recipe()
    check_files(recipe)
    check_world(recipe, recipe.train.processes, cuda=False)


def describe_run(recipe: Any) -> str:
    """Folder, processes and strategy in one line."""
    from alignvlm.run_folder import Run

    number = recipe.train.processes
    processes = f"{number} process{'es' if number > 1 else ''}"
    return f"run {Run(recipe).folder.path}: {processes}, DeepSpeed {recipe.train.deepspeed}"


def dry_run(recipe: Any) -> int:
    """Print the folder, the stages, where each would resume, and what data is missing."""
    from alignvlm.checks import missing_data
    from alignvlm.run_folder import Run

    run = Run(recipe)
    print(describe_run(recipe))
    for stage in recipe.stages.values():
        folder = run.stage_folder(stage)
        checkpoints = folder.checkpoint_folders()
        if folder.has_export:
            status = "finished"
        elif checkpoints:
            status = f"would resume at {checkpoints[-1].name}"
        else:
            status = "would start"
        mixture = ", ".join(f"{source} {weight:g}" for source, weight in stage.mixture.items())
        length = f"{stage.epochs} epoch(s)" + (f", at most {stage.max_steps} steps," if stage.max_steps else "")
        print(f"  {stage.number} {stage.name}: {status}; {length} of {mixture}; trains {', '.join(stage.trained)}")
    for message in missing_data(recipe).values():
        print(f"  missing: {message}")
    return 0


def print_locations(recipe: Any) -> None:
    """Where the results of a finished run are and what to do with them."""
    from alignvlm.run_folder import Run
    from alignvlm.training.tracking.target import Target

    run = Run(recipe)
    export = run.newest_export()
    print(f"\nfinished: {run.folder.path}")
    print(f"  report   {run.folder.report_page}")
    print(f"  model    {export}")
    uri = Target.of(run).shown_uri
    print(f"  MLflow   {uri if uri.startswith('http') else f'mlflow ui --backend-store-uri {uri}'}")
    if "tensorboard" in recipe.tracking.also:
        print(f"  also     tensorboard --logdir {run.folder.tensorboard}")
    for folder in sorted(run.folder.wandb.glob("offline-run-*")) if "wandb" in recipe.tracking.also else []:
        print(f"  also     wandb sync {folder}")
    print(f"  chat     alignvlm chat {export} --image FILE")
    sys.stdout.flush()
