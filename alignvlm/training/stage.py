"""One stage: find the newest checkpoint, build the engine, step to the end, export. Reads top to bottom."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from alignvlm import stage_data
from alignvlm.config.schema import Recipe, StageConfig
from alignvlm.errors import UserError
from alignvlm.estimates.automatic import noted_recomputation
from alignvlm.exports import check_export
from alignvlm.kernels.fused_layers import choose_fused_layers
from alignvlm.model import AlignVLMProcessor
from alignvlm.progress import say
from alignvlm.run_folder import ATTEMPTS_LINE, Run
from alignvlm.system.signals import Signals
from alignvlm.system.timeline import Timeline
from alignvlm.training.batches import step_batches
from alignvlm.training.callbacks import Callback, StageState
from alignvlm.training.callbacks.bad_numbers import agreed_skips
from alignvlm.training.checkpoints.export import export_stage
from alignvlm.training.checkpoints.gathering import gather_adapters
from alignvlm.training.checkpoints.masters import load_masters, save_masters
from alignvlm.training.checkpoints.store import CheckpointInfo, CheckpointStore, not_valid
from alignvlm.training.distributed import World, gpu_bytes
from alignvlm.training.engine import Trainer, build_trainer
from alignvlm.training.optim import lr_factor
from alignvlm.training.record import StepRecord
from alignvlm.training.step import StepResult, Votes, train_step
from alignvlm.training.throughput import Speed, Throughput
from data_pipeline.errors import DataError
from data_pipeline.files import read_json_lines
from data_pipeline.loading.collate import MicroBatch
from data_pipeline.loading.ledger import Ledger
from data_pipeline.order.plan import Plan
from data_pipeline.stores import hub


def train_stage(
    run: Run,
    stage: StageConfig,
    world: World,
    processor: AlignVLMProcessor,
    callbacks: Sequence[Callback],
    signals: Signals,
    timeline: Timeline,
) -> str | None:
    """Train a stage from the export of the stage before, or from its newest valid checkpoint.

    Returns:
        None when the stage is finished and exported, else the reason for stopping early (a checkpoint is written).
    """
    timeline.enter("engine")
    run = Run(with_recomputation(run, stage, world))
    recipe, folder = run.recipe, run.stage_folder(stage)
    plan = stage_data.stage_plan(recipe, stage, processor)
    check_agreement(plan, world)
    kept = recipe.checkpoint
    store = CheckpointStore(folder.checkpoints, world, kept.keep_last, kept.keep_every, kept.keep_best)
    trainer, found = resume_trainer(run, stage, world, plan, store, timeline)
    ended_early = found.state.get("ended_early") if found else None
    state = StageState(
        recipe=recipe,
        run=run,
        stage=stage,
        folder=folder,
        world=world,
        trainer=trainer,
        plan=plan,
        processor=processor,
        store=store,
        num_steps=found.step if found and ended_early else plan.num_steps,
        signals=signals,
        callbacks=callbacks,
        step=found.step if found else 0,
        ended_early=ended_early,
        timeline=timeline,
    )
    try:
        restore_callbacks(callbacks, found)
        run_steps(state)
        if state.stop_reason is None:
            timeline.enter("export")
            if state.ended_early and world.is_main:
                planned = plan.num_steps
                say(f"stage {stage.name} ends early, at step {state.step} of {planned}: {state.ended_early}")
            before = run.folder_before(stage)
            adapters = gather_adapters(trainer.model, stage, before.export, world)
            if recipe.train.precision == "bf16" and stage.number < len(recipe.stages):
                save_masters(trainer.engine, before, folder, world, adapters)
            export_stage(trainer.model, processor, folder.export, world, adapters)
    finally:
        trainer.close()
    return state.stop_reason


def with_recomputation(run: Run, stage: StageConfig, world: World) -> Recipe:
    """The run's recipe with what `train.gradient_checkpointing: auto` is in this stage; rank 0 chooses for all."""
    recipe = run.recipe
    if recipe.train.gradient_checkpointing != "auto":
        return recipe
    smallest = min(world.all_gather(gpu_bytes(world.device)))
    fused = choose_fused_layers(recipe.model.fused_layers, world.device)
    chosen = world.of_main(lambda: noted_recomputation(run, stage, world.size, smallest, fused))
    return replace(recipe, train=replace(recipe.train, gradient_checkpointing=chosen))


def resume_trainer(
    run: Run, stage: StageConfig, world: World, plan: Plan, store: CheckpointStore, timeline: Timeline
) -> tuple[Trainer, CheckpointInfo | None]:
    """Build the stage's engine and load its newest valid checkpoint, also one that another number of ranks saved.

    Raises:
        UserError: when the data is not what the checkpoint was trained on, or its files are not as they should be.
        DataError: what the stage before has left is damaged.
    """
    before = run.folder_before(stage)
    found = store.newest(say)
    while True:
        if found is not None:
            check_position(found, plan, run.folder.attempts)
        check_export(before.export)
        trainer = build_trainer(run.recipe, stage, before.export, world)
        if found is None:
            if run.recipe.train.precision == "bf16":
                load_masters(trainer.engine, before, world)
            return trainer, None
        timeline.enter("load")
        if world.is_main and found.state["world_size"] != world.size:
            say(f"{found.folder}: converting from {found.state['world_size']} to {world.size} ranks")
        problem = store.load(trainer.engine, found)
        if problem is None:
            return trainer, found
        if world.is_main:
            say(not_valid(found.folder, problem))
        trainer.close()  # it holds parts of what is damaged
        timeline.enter("engine")
        found = store.newest(say, before=found.step)


def check_agreement(plan: Plan, world: World) -> None:
    """Raise DataError on all ranks when one of them, such as on a host with another mount, sees other data."""
    seen = world.all_gather(plan.fingerprint)
    others = [rank for rank, fingerprint in enumerate(seen) if fingerprint != seen[0]]
    if others:
        raise DataError(
            f"ranks {', '.join(map(str, others[:8]))}{', …' if others[8:] else ''} see other data than rank 0: "
            "manifests, sample lengths or caches of their hosts differ; let all hosts see the same folders"
        )


def check_position(found: CheckpointInfo, plan: Plan, attempts: Path) -> None:
    """Raise UserError when the data is not what the checkpoint was trained on; `attempts` is the run's record."""
    position = plan.position(found.step).to_json()
    if found.state["position"] != position:
        raise UserError(
            f"{found.folder}: trained on other data or in another order: its position was "
            f"{found.state['position']}, step {found.step} is now {position}. {moved_on_the_hub(attempts)}"
            "Restore the shards, or start a new run"
        )


def moved_on_the_hub(attempts: Path) -> str:
    """A sentence for each branch that was at another commit when a stage was last started, and what to do."""
    rows = read_json_lines(attempts, ATTEMPTS_LINE) if attempts.exists() else []
    before, now = rows[-1].get("hub", {}) if rows else {}, hub.held_commits()
    return "".join(
        f"hf://{branch} was at commit {commit} and is at {now[branch]}: name the former in the source's path "
        f"(hf://{branch.partition('@')[0]}@{commit}). "
        for branch, commit in before.items()
        if now.get(branch, commit) != commit
    )


def restore_callbacks(callbacks: Sequence[Callback], found: CheckpointInfo | None) -> None:
    """Give callbacks the state that the checkpoint holds for them; older checkpoints hold none."""
    saved = found.state.get("callbacks", {}) if found else {}
    for callback in callbacks:
        if callback.name in saved:
            callback.load_state(saved[callback.name])


def start_loader(state: StageState) -> Iterable[list[MicroBatch]]:
    """The batches from `state.step` on, with the loader processes already running."""
    if state.step == state.num_steps:
        return []
    ledger = Ledger(state.run.folder.quarantine, state.recipe.data.max_bad_fraction)
    loader = stage_data.stage_loader(
        state.recipe, state.stage, state.plan, state.processor,
        rank=state.world.rank, world_size=state.world.size, start_step=state.step, ledger=ledger,
        pin_memory=state.world.device.type == "cuda",
    )  # fmt: skip
    return loader.start()


def run_steps(state: StageState) -> None:
    """Take the stage's steps until its end or until a callback or a signal stops it."""
    state.timeline.enter("engine")
    throughput = Throughput(state.recipe, state.stage, state.trainer.config, state.world, state.folder.flops)
    gc.freeze()  # what lives now stays: no later collection walks through it, and loader processes share its pages
    try:
        # Loader processes are forked: a lock that another thread holds at that moment stays locked in them for ever.
        # So they start before the callbacks' threads (the writer of checkpoints), which end with the stage.
        loader = start_loader(state)
        for callback in state.callbacks:
            callback.on_start(state)
        state.signals.stepping = True
        skips = agreed_skips(state)
        state.timeline.enter("steps")
        for batches in step_batches(loader, range(state.step, state.num_steps), skips):
            state.step, state.scores = batches.step, {}
            for callback in state.callbacks:
                callback.before_step(state, batches.micro_batches)
            factor = lr_factor(state.stage, state.step, state.num_steps)
            votes = Votes(stop=state.signals.received is not None, written=state.store.is_written)
            result = train_step(
                state.trainer, batches.micro_batches, state.world, factor, votes, batches.failure, state.plan.names,
                state.shared,
            )  # fmt: skip
            state.shared = result.shared
            state.step += 1
            state.is_written = result.votes.written == state.world.size
            if result.votes.stop:
                state.stop_reason = f"signal {state.signals.received or 'at another rank'}"
            speed = throughput.measure(result.counts, result.seconds, batches.data_wait)
            record = step_record(state, result, speed)
            state.checkpoint_stall = 0.0
            for callback in state.callbacks:
                callback.on_step(state, record)
            if state.stop_reason is not None or state.is_last_step:
                return
        state.step = state.num_steps  # also when the last steps are left out
    finally:
        gc.unfreeze()
        state.signals.ending = state.stop_reason is not None  # the other ranks may have ended before this one
        state.signals.stepping = False
        for callback in state.callbacks:
            callback.on_end(state)


def step_record(state: StageState, result: StepResult, speed: Speed) -> StepRecord:
    """The record of the step that was just taken, without what callbacks add."""
    counts = result.counts
    return StepRecord(
        stage=state.stage.name,
        step=state.step,
        time=time.time(),
        epoch=result.epoch,
        loss=result.loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens=int(counts.tokens),
        samples=int(counts.samples),
        supervised=int(counts.supervised),
        tiles=int(counts.tiles),
        skipped=result.skipped,
        fill=counts.tokens / (state.stage.global_batch_packs * state.stage.sequence_length),
        checkpoint_stall=state.checkpoint_stall,
        source_loss={name: part.loss for name, part in result.sources.items() if part.loss is not None},
        source_tokens={name: part.tokens for name, part in result.sources.items()},
        source_supervised={name: part.supervised for name, part in result.sources.items()},
        **speed._asdict(),
    )
