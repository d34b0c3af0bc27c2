"""The story of a run: prepare, evaluate, train stage after stage, report. Called again, it goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Sequence

from alignvlm.config.schema import Recipe
from alignvlm.evaluation.evaluate import evaluate
from alignvlm.report.report import build_report
from alignvlm.run_folder import Run, StageFolder
from alignvlm.training import distributed
from alignvlm.training.callbacks import Callback
from alignvlm.training.callbacks.bad_numbers import BadNumbers
from alignvlm.training.callbacks.checkpoints import Checkpoints
from alignvlm.training.callbacks.connector_statistics import ConnectorStatistics
from alignvlm.training.callbacks.metrics_log import MetricsLog
from alignvlm.training.callbacks.progress_bar import ProgressBar
from alignvlm.training.callbacks.tracking import Tracking
from alignvlm.training.callbacks.watchdog import Watchdog
from alignvlm.training.distributed import World
from alignvlm.training.prepare import prepare, run_processor
from alignvlm.training.signals import REQUEUE, Signals
from alignvlm.training.stage import train_stage
from alignvlm.training.tracking.tracker import Tracker


def train(recipe: Recipe) -> int:
    """Run the recipe to its end, or to an early stop with everything saved; returns the exit code."""
    run = Run(recipe)
    if os.environ.get("RANK", "0") == "0":
        prepare(run)
    world = distributed.start(recipe.train.timeout_minutes)
    try:
        world.barrier()
        tracker = Tracker(run) if world.is_main else None
        try:
            return _train(run, world, tracker, Signals())
        finally:
            if tracker is not None:
                tracker.close()
    finally:
        distributed.stop()


def _train(run: Run, world: World, tracker: Tracker | None, signals: Signals) -> int:
    processor = run_processor(run)
    evaluate_stage(run, run.initial, world)
    for stage in run.recipe.stages.values():
        if not run.stage_folder(stage).has_export:
            reason = train_stage(run, stage, world, processor, callbacks(tracker), signals)
            if reason is not None:
                if world.is_main:
                    print(f"stopped in stage {stage.name}: {reason}; the same command resumes here", flush=True)
                return REQUEUE
        evaluate_stage(run, run.stage_folder(stage), world)
    if world.is_main:
        build_report(run.folder.path)
    return 0


def callbacks(tracker: Tracker | None) -> Sequence[Callback]:
    """In the order they act: the record is complete before it is written, and written before a checkpoint."""
    shown: list[Callback] = [ConnectorStatistics(), BadNumbers(), MetricsLog(), ProgressBar(), Watchdog()]
    if tracker is not None:
        shown.append(Tracking(tracker))
    return [*shown, Checkpoints()]


def evaluate_stage(run: Run, folder: StageFolder, world: World) -> None:
    """Held-out evaluation of a stage's export, once; all ranks share the items."""
    if run.recipe.evaluation.tasks:
        evaluate(
            folder.export, run.recipe, folder.evaluation.path,
            rank=world.rank, world_size=world.size, barrier=world.barrier, device=str(world.device), progress=True,
        )  # fmt: skip
