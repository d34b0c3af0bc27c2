"""One stage: build the engine, find where to go on, step to the end, export. Reads top to bottom."""

from __future__ import annotations

import time
from collections.abc import Sequence

from alignvlm import data
from alignvlm.errors import UserError
from alignvlm.model import AlignVLMProcessor
from alignvlm.training.callbacks import Callback, StageState
from alignvlm.training.checkpoint import CheckpointStore, Found
from alignvlm.training.distributed import World
from alignvlm.training.engine import build_trainer
from alignvlm.training.export import export_stage
from alignvlm.training.optim import lr_factor
from alignvlm.training.run import Run
from alignvlm.training.step import train_step
from alignvlm.training.throughput import Throughput
from data_pipeline.ledger import Ledger


def train_stage(
    run: Run, index: int, world: World, processor: AlignVLMProcessor, callbacks: Sequence[Callback]
) -> str | None:
    """Train stage `index` (1-based) from the export of the stage before, or from its newest valid checkpoint.

    Returns:
        None when the stage is finished and exported, else the reason for stopping early (a checkpoint is written).
    """
    recipe, name = run.recipe, run.stages[index - 1]
    stage = recipe.stages[name]
    plan = data.stage_plan(recipe, name, processor)
    store = CheckpointStore(
        run.stage_folder(index) / "checkpoints", world, recipe.checkpoint.keep_last, recipe.checkpoint.keep_every
    )
    trainer = build_trainer(recipe, name, run.export(index - 1), world)
    state = StageState(recipe, run, index, name, stage, world, trainer, plan, store, plan.num_steps)
    found = store.newest(lambda text: print(text, flush=True))
    if found is not None:
        resume(state, found)
    state.attempt = {"stage": name, "resumed_at": state.step, "world_size": world.size}
    try:
        _run_steps(state, processor, callbacks)
        if state.stop_reason is None:
            export_stage(trainer.model, processor, run.export(index), world)
    finally:
        trainer.close()
    return state.stop_reason


def resume(state: StageState, found: Found) -> None:
    """Bring engine, random state and position back from a checkpoint.

    Raises:
        UserError: when the data is not what the checkpoint was trained on.
    """
    position = state.plan.position(found.step).to_json()
    if found.state["position"] != position:
        raise UserError(
            f"{found.folder}: trained on other data or in another order: its position was "
            f"{found.state['position']}, step {found.step} is now {position}. Restore the shards, or start a new run"
        )
    state.store.load(state.trainer.engine, found)
    state.step = found.step


def _run_steps(state: StageState, processor: AlignVLMProcessor, callbacks: Sequence[Callback]) -> None:
    ledger = Ledger(state.run.quarantine_file, state.recipe.data.max_bad_fraction)
    throughput = Throughput(state.recipe, state.stage, state.trainer.model.config, state.world)
    capacity = state.stage.global_batch_packs * state.stage.sequence_length
    for callback in callbacks:
        callback.on_start(state)
    try:
        if state.step == state.num_steps:
            return
        loader = data.stage_loader(
            state.recipe, state.name, state.plan, processor,
            rank=state.world.rank, world_size=state.world.size, start_step=state.step, ledger=ledger,
        )  # fmt: skip
        batches = iter(loader)
        while state.step < state.num_steps and state.stop_reason is None:
            began = time.perf_counter()
            micro_batches = next(batches)
            data_wait = time.perf_counter() - began
            for callback in callbacks:
                callback.before_step(state)
            factor = lr_factor(state.stage, state.step, state.num_steps)
            result = train_step(state.trainer, micro_batches, state.world, factor)
            state.step += 1
            epoch = micro_batches[0].epoch
            record = {"stage": state.name, "step": state.step, "epoch": epoch, "time": time.time(), **result}
            record |= throughput.measure(record, data_wait) | {"fill": record["tokens"] / capacity}
            for callback in callbacks:
                callback.on_step(state, record)
    finally:
        for callback in callbacks:
            callback.on_end(state)
