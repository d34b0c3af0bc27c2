"""A LoRA stage with dropout: steps, resumes, checkpoints, exports and fp32 masters, on two ranks and then on one.

Part of the job of zero3_worker.py; test_zero3.py looks at what it leaves.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from alignvlm.config import load_recipe
from alignvlm.run_folder import Run
from alignvlm.system.timeline import Timeline
from alignvlm.training.callbacks.health.replay import loss_and_norm
from alignvlm.training.checkpoints.export import export_stage
from alignvlm.training.checkpoints.gathering import gather_adapters
from alignvlm.training.checkpoints.masters import save_masters
from alignvlm.training.checkpoints.store import CheckpointInfo, CheckpointStore
from alignvlm.training.distributed import World
from alignvlm.training.engine import Trainer
from alignvlm.training.stage import resume_trainer
from data_pipeline.loading.collate import MicroBatch
from tests.integration.bf16_worker import held_out
from tests.jobs import TINY
from tests.one_rank import masters, micro_batches, take_step
from tests.tiny import tiny_model

CASES = {"cpu_zero3": "fp32", "zero2": "bf16"}
"""DeepSpeed strategy -> precision."""
ALIKE = ("zero1", "zero2")
"""Strategies that compute in fp32 what one rank does."""
STEPS, SAVED = 3, 1
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.3}


def run_of(folder: Path, strategy: str, precision: str) -> Run:
    """A run whose first stage trains adapters and the connector, with four packs a step."""
    return Run(load_recipe(str(TINY), [
        f"name={strategy}-{precision}", f"runs={folder}", f"train.deepspeed={strategy}", f"train.precision={precision}",
        "stages.connector.global_batch_packs=4", f"stages.connector.lora={json.dumps(LORA)}",
        "stages.connector.trainable=[connector.*]", "stages.connector.lr={connector: 1.0e-3, language: 1.0e-2}",
        "checkpoint.keep_best=loss/test", "evaluation.loss={sources: [test]}",
    ]))  # fmt: skip


def begin(run: Run, world: World, found: CheckpointInfo | None = None, stage: str = "connector") -> Trainer:
    """The engine of a stage, from a checkpoint where there is one."""
    plan: Any = SimpleNamespace(position=lambda step: SimpleNamespace(to_json=lambda: None))
    store = store_of(run, world)
    store.newest = lambda warn, before=None: found  # type: ignore[method-assign]
    return resume_trainer(run, run.recipe.stages[stage], world, plan, store, Timeline())[0]


def store_of(run: Run, world: World) -> CheckpointStore:
    return CheckpointStore(run.stage_folder(run.recipe.stages["connector"]).checkpoints, world, 9, None)


def save(run: Run, trainer: Trainer, world: World, step: int) -> None:
    """A checkpoint after `step` steps; the first one is the best."""
    store = store_of(run, world)
    store.attach(trainer.engine)
    state = {"step": step, "world_size": world.size, "position": None, "scores": {"loss/test": float(step)}}
    assert store.begin(trainer.engine, state) is None
    assert store.finish() is None
    store.close()


def first_checkpoint(run: Run) -> CheckpointInfo:
    folder = run.stage_folder(run.recipe.stages["connector"]).checkpoint_folders()[0]
    return CheckpointInfo(folder, json.loads((folder / "state.json").read_bytes()))


def train(run: Run, trainer: Trainer, world: World, first: int = 0, saves: bool = False) -> dict[str, Any]:
    """Steps from `first` on: losses and norms, and everything that was trained; the first step's batch is replayed.

    A replay changes nothing, or a run from the start would not be what a resumed one is.
    """
    curve, replays = [], []
    if first == 0:
        replays = [loss_and_norm(trainer, batches(0, world)[1], world.device) for _ in range(2)]
    for step in range(first, STEPS):
        result = take_step(trainer, batches(step, world), world)
        curve.append((result.loss, result.grad_norm))
        if saves and step + 1 in (SAVED, STEPS):
            save(run, trainer, world, step + 1)
    return {"curve": curve, "weights": masters(trainer), "replays": replays}


def batches(step: int, world: World) -> list[MicroBatch]:
    """This rank's micro-batches of a step."""
    return [replace(batch, step=step) for batch in micro_batches(4)[world.rank :: world.size]]


def on_two_ranks(folder: Path, world: World) -> dict[str, dict[str, Any]]:
    """Strategy -> what the stage found in one go, and resumed; it leaves checkpoints, export and masters."""
    results: dict[str, dict[str, Any]] = {}
    for strategy, precision in CASES.items():
        run = run_of(folder, strategy, precision)
        stage = run.recipe.stages["connector"]
        open_run(run, world)
        trainer = begin(run, world)
        found: dict[str, Any] = {"before": held_out(trainer, world)["loss/held_out"]}
        found["whole"] = train(run, trainer, world, saves=True)
        found["after"] = held_out(trainer, world)["loss/held_out"]
        adapters = gather_adapters(trainer.model, stage, run.initial.export, world)
        if precision == "bf16":
            save_masters(trainer.engine, run.initial, run.stage_folder(stage), world, adapters)
        export_stage(trainer.model, tiny_model()[1], run.stage_folder(stage).export, world, adapters)
        trainer.close()
        trainer = begin(run, world, first_checkpoint(run))
        found["resumed"] = train(run, trainer, world, SAVED)
        trainer.close()
        results[strategy] = found
    for strategy in ALIKE:
        run = run_of(folder, strategy, "fp32")
        open_run(run, world)
        trainer = begin(run, world)
        results[f"{strategy} in fp32"] = {"whole": train(run, trainer, world)}
        trainer.close()
    return results


def open_run(run: Run, world: World) -> None:
    """Give a run its first model."""
    if world.is_main:
        run.open()
        model, processor = tiny_model()
        (model.bfloat16() if run.recipe.train.precision == "bf16" else model).save_pretrained(run.initial.export)
        processor.save_pretrained(run.initial.export)
    world.barrier()


def on_one_rank(folder: Path, world: World, results: dict[str, dict[str, Any]]) -> None:
    """Adds the same on one rank from the checkpoint of two; in fp32 from the beginning too, and the next stage."""
    for strategy, precision in CASES.items():
        run, found = run_of(folder, strategy, precision), results[strategy]
        trainer = begin(run, world, first_checkpoint(run))
        found["elastic"] = train(run, trainer, world, SAVED)
        trainer.close()
        if precision != "fp32":
            continue
        trainer = begin(run, world)
        found["alone"] = train(run, trainer, world)
        trainer.close()
        trainer = begin(run, world, stage="instruct")
        found["next"] = {"held_out": held_out(trainer, world)["loss/held_out"], "weights": masters(trainer)}
        trainer.close()
