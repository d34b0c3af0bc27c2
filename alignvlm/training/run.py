"""The story of a run: prepare, evaluate, train stage after stage, report. Called again, it resumes."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from alignvlm.config import load_recipe
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.estimates.savings import memory_advice
from alignvlm.evaluation.benchmarks.job import jobs_of_recipe
from alignvlm.evaluation.benchmarks.run import run_benchmarks
from alignvlm.evaluation.evaluate import evaluate
from alignvlm.evaluation.perplexity import measure_texts
from alignvlm.launch.local import is_launched
from alignvlm.progress import say
from alignvlm.report.report import build_report
from alignvlm.run_folder import Run, StageFolder
from alignvlm.system.home import ensure_home
from alignvlm.system.lease import Lease
from alignvlm.system.monitor.heart import Heart
from alignvlm.system.monitor.start import Monitor
from alignvlm.system.ranks import MISTAKES, is_rank_0
from alignvlm.system.signals import REQUEUE, Signals
from alignvlm.system.timeline import Timeline
from alignvlm.system.waiting import Waiting
from alignvlm.training import distributed
from alignvlm.training.callbacks import Callback
from alignvlm.training.callbacks.bad_numbers import BadNumbers
from alignvlm.training.callbacks.checkpoints import Checkpoints
from alignvlm.training.callbacks.connector_statistics import ConnectorStatistics
from alignvlm.training.callbacks.early_end import EarlyEnd
from alignvlm.training.callbacks.health.replay import Replay
from alignvlm.training.callbacks.health.step_limit import StepLimit
from alignvlm.training.callbacks.held_out_loss import HeldOutLoss
from alignvlm.training.callbacks.metrics_log import MetricsLog
from alignvlm.training.callbacks.progress_bar import ProgressBar
from alignvlm.training.callbacks.rank_times import RankTimes
from alignvlm.training.callbacks.tracking import Tracking
from alignvlm.training.checkpoints.masters import remove_masters
from alignvlm.training.distributed import World
from alignvlm.training.engine import free_memory
from alignvlm.training.finished import seal
from alignvlm.training.prepare import check, prepare, run_processor
from alignvlm.training.stage import train_stage
from alignvlm.training.tracking.tracker import Tracker
from data_pipeline.stores import hub


def train(
    recipe: Recipe | str | Path,
    callbacks: Sequence[Callback] = (),
    began: float | None = None,
    heart: Heart | None = None,
) -> int:
    """Run a recipe to its end, or to an early stop with everything saved. Called again, it resumes.

    Every rank of a job calls it. It starts no processes: without a launcher it runs as one process, whatever
    `train.processes` says. Start your script with `torchrun --nproc-per-node N script.py` for N ranks.

    Args:
        recipe: a recipe, the name of a built-in one, or the path of a YAML file.
        callbacks: your own; they see a record that the built-in callbacks have completed and may add to it before it is
            written, and checkpoints keep their state. The same objects serve all stages.
        began: when this job was started, in seconds since 1970, for the time that its start took (`alignvlm goodput`);
            None: now.
        heart: of a monitor that watches this process already (`alignvlm train` starts it before everything else);
            None: one is started, and ended before this returns.

    Returns:
        The exit code: 0 when the run is finished, 75 when it stopped early (a signal, a loss spike) and the same call
        resumes it.

    Raises:
        UserError: a setting or a callback cannot work, or another job trains this run. DataError: data cannot be read.
    """
    called = time.time()
    ensure_home()
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(str(recipe))
    with Monitor(recipe.resilience.limits) if heart is None else nullcontext(heart) as heart:
        heart.enter("prepare")
        return _train_watched(recipe, callbacks, called if began is None else began, called, heart)


def _train_watched(recipe: Recipe, callbacks: Sequence[Callback], began: float, called: float, heart: Heart) -> int:
    all_callbacks(None, callbacks)  # a mistake is reported before anything is prepared
    if recipe.train.processes > 1 and not is_launched():
        print(
            f"train.processes: {recipe.train.processes} has no effect here: this script runs as one process. Start it "
            f"with `torchrun --nproc-per-node {recipe.train.processes} {sys.argv[0]}`",
            flush=True,
        )
    run = Run(recipe)
    is_main = is_rank_0()
    if is_main:
        check(run)
    lease = Lease(run.folder.path)
    with hub.held() as commits, lease if is_main else nullcontext():
        file = run.folder.timeline if is_main else None
        with Timeline(file, began, called, heart, last_beat=lease.last_beat) as timeline:
            return _job(run, lease, timeline, heart, commits, callbacks)


def _job(
    run: Run,
    lease: Lease,
    timeline: Timeline,
    heart: Heart,
    commits: dict[str, str],
    callbacks: Sequence[Callback],
) -> int:
    """Prepare on rank 0, meet the other ranks, train."""

    def leave() -> None:
        try:
            timeline.end()
        finally:
            lease.release()

    signals = Signals(before_exit=leave, before_save=lease.announce_end)
    with Waiting() as waiting:
        if is_rank_0():
            with signals:
                prepare(run, heart.beat)
            timeline.enter("rendezvous")
            waiting.go_on()
        else:
            with heart.waiting():
                waiting.wait()
            timeline.enter("rendezvous")
        # No handler of Python interrupts the code in which ranks meet: a signal has its default action.
        world = distributed.start(run.recipe.train.timeout_minutes, heart)
    try:
        world.barrier()
        commits.update(world.broadcast(commits))  # a branch may have moved since rank 0 has looked
        tracker, crashed = Tracker(run) if world.is_main else None, True
        with signals:
            try:
                code = _train(run, world, tracker, signals, callbacks, timeline)
                crashed = False
            except MISTAKES:  # launchers do not start again
                crashed = False
                raise
            finally:
                signals.ending = not crashed
                lease.announce_end()
                timeline.enter("delivery")
                if tracker is not None and crashed:
                    tracker.abandon()
                is_delivered = tracker is not None and not crashed and tracker.close()
        if code == 0 and is_delivered:
            seal(run)
        timeline.finished = code == 0
        return code
    finally:
        distributed.stop()


def _train(
    run: Run,
    world: World,
    tracker: Tracker | None,
    signals: Signals,
    own: Sequence[Callback],
    timeline: Timeline,
) -> int:
    processor = run_processor(run)
    timeline.enter("evaluation")
    evaluate_stage(run, run.initial, world)
    for stage in run.recipe.stages.values():
        # Rank 0 looks: a host that has looked for a folder before may not see at once that it is there now.
        if not world.broadcast(world.is_main and run.stage_folder(stage).has_export):
            with memory_advice(run.recipe, stage):
                reason = train_stage(run, stage, world, processor, all_callbacks(tracker, own), signals, timeline)
            if reason is not None:
                if world.is_main:
                    say(f"stopped in stage {stage.name}: {reason}; the same command resumes here")
                return REQUEUE
        if world.is_main:
            remove_masters(run.folder_before(stage))
        timeline.enter("evaluation")
        evaluate_stage(run, run.stage_folder(stage), world)
    timeline.enter("report")
    if world.is_main:
        build_report(run.folder.path)
    return 0


def all_callbacks(tracker: Tracker | None, own: Sequence[Callback] = ()) -> list[Callback]:
    """The callbacks of a stage in the order they are called.

    First those that complete the record, then the user's own, whose scores may end the stage, then those that write and
    show the record, the checkpoints last: a checkpoint holds the state of all others after the step.

    Raises:
        UserError: two callbacks have the same name, or one of the user's is no callback.
    """
    for callback in own:
        if not isinstance(callback, Callback):
            raise UserError(f"callbacks: {callback!r} is not an instance of alignvlm.Callback")
    tracking = [Tracking(tracker)] if tracker is not None else []
    ordered: list[Callback] = [
        ConnectorStatistics(), RankTimes(), BadNumbers(), Replay(), HeldOutLoss(), *own, EarlyEnd(), MetricsLog(),
        ProgressBar(), StepLimit(), *tracking, Checkpoints(),
    ]  # fmt: skip
    names = [callback.name for callback in ordered]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"callbacks: two are named {name!r}; give your own class another name")
    return ordered


def evaluate_stage(run: Run, folder: StageFolder, world: World) -> None:
    """Held-out tasks, texts and benchmarks of a stage's export, once; all ranks share the items."""
    recipe = run.recipe
    shared: dict[str, Any] = {"ranks": world, "device": str(world.device), "progress": True}
    if recipe.evaluation.tasks:
        evaluate(folder.export, recipe, folder.evaluation.path, **shared)
    if recipe.evaluation.text:
        measure_texts(folder.export, recipe, folder.evaluation.path, **shared)
    if recipe.evaluation.benchmarks:
        jobs = world.together(jobs_of_recipe, recipe)
        run_benchmarks(folder.export, jobs, folder.benchmarks.path, batch_size=recipe.evaluation.batch_size, **shared)
    if recipe.evaluation.tasks or recipe.evaluation.text or recipe.evaluation.benchmarks:
        free_memory()
