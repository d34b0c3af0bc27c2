"""bf16 under ZeRO-1, 2 and 3: fp32 masters from stage to stage, bad gradients, sums of gradients, checkpoints.

Two ranks hand masters on; then rank 0 goes on alone. Argument: the folder to work in; results.json is written there.
Started by test_bf16.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import safe_get_full_grad, safe_get_full_optimizer_state
from safetensors.torch import save_file

from alignvlm.config import load_recipe
from alignvlm.model import AlignVLMForConditionalGeneration
from alignvlm.model.attention import SDPA
from alignvlm.run_folder import Run, checkpoint_folder
from alignvlm.stage_data import HeldOutPacks
from alignvlm.system.timeline import Timeline
from alignvlm.training import distributed
from alignvlm.training.callbacks.held_out_loss import measure
from alignvlm.training.checkpoints.export import export_stage
from alignvlm.training.checkpoints.masters import save_masters, trainable
from alignvlm.training.checkpoints.store import CheckpointInfo, CheckpointStore
from alignvlm.training.distributed import World
from alignvlm.training.engine import Trainer
from alignvlm.training.stage import resume_trainer
from data_pipeline.errors import DataError
from data_pipeline.loading.collate import collate
from tests.fixtures.damage import full_disk
from tests.jobs import TINY
from tests.one_rank import masters, micro_batches, take_bad_step, take_step, trainer_of
from tests.tiny import tiny_model

MICRO_BATCHES = 16
HELD_OUT = ["text", "pages", "text", "pages", "text"]
"""Sources of the packs of a held-out loss: on two ranks the last one is computed beside a filler."""
SETTINGS = ("stages.connector.max_grad_norm=0", "train.kept_logits_gib=0.001")


def summed(trainer: Trainer, world: Any) -> dict[str, torch.Tensor]:
    """Gradients of a step as the optimizer gets them."""
    found: dict[str, torch.Tensor] = {}
    step = trainer.engine.step

    def look() -> None:
        if trainer.engine.is_gradient_accumulation_boundary():
            learns = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
            found.update((name, safe_get_full_grad(p).float().clone()) for name, p in learns)
        step()

    trainer.engine.step = look
    take_step(trainer, micro_batches(MICRO_BATCHES), world)
    return found


def expected(folder: Path) -> dict[str, torch.Tensor]:
    """The same without DeepSpeed: bf16 gradients of each micro-batch, summed in fp32."""
    attention = {"text_config": SDPA, "vision_config": "sdpa"}
    model = AlignVLMForConditionalGeneration.from_pretrained(
        folder / "model", dtype=torch.bfloat16, attn_implementation=attention
    ).train()
    batches = micro_batches(MICRO_BATCHES)
    tokens = sum(batch.num_supervised for batch in batches)
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    for b in batches:
        model.zero_grad()
        inputs = {"input_ids": b.input_ids, "pixel_values": b.tiles, "position_ids": b.position_ids}
        places = {"visual_positions": b.visual_positions, "target_positions": b.target_positions, "targets": b.targets}
        packed = {"cu_seqlens": b.cu_seqlens, "max_seqlen": b.max_seqlen}
        model(**inputs, **places, **packed, num_items_in_batch=tokens / MICRO_BATCHES).loss.backward()
        for name, parameter in model.named_parameters():
            sums[name] += parameter.grad.float() / MICRO_BATCHES
    return sums


def error(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm of the reference, all parameters together of which there is a gradient."""
    norm = lambda tensors: torch.cat([t.flatten() for t in tensors]).double().norm()
    return float(norm([found[n] - reference[n] for n in found]) / norm([reference[n] for n in found]))


def run_of(folder: Path, strategy: str) -> Run:
    """A run of two stages, with four packs a step."""
    return Run(load_recipe(str(TINY), [
        f"name={strategy}", f"runs={folder}", f"train.deepspeed={strategy}", "train.precision=bf16",
        "stages.connector.global_batch_packs=4", "stages.instruct.global_batch_packs=4",
    ]))  # fmt: skip


def save(run: Run, trainer: Trainer, world: World, step: int) -> None:
    """A checkpoint of the second stage, as after `step` steps."""
    store = CheckpointStore(run.stage_folder(run.recipe.stages["instruct"]).checkpoints, world, 9, None)
    store.attach(trainer.engine)
    assert store.begin(trainer.engine, {"step": step, "scores": {"loss/held_out": float(step)}}) is None
    assert store.finish() is None
    store.close()


def saved_by_two(run: Run) -> CheckpointInfo:
    """The checkpoint of `hand_on`."""
    folder = checkpoint_folder(run.stage_folder(run.recipe.stages["instruct"]).checkpoints, 1)
    return CheckpointInfo(folder, {"step": 1, "world_size": 2})


def learned(trainer: Trainer, world: World) -> dict[str, torch.Tensor]:
    """What training goes on from: fp32 weights, moments and steps of the optimizer, weights in bf16."""
    found = {f"{name}/fp32": value for name, value in masters(trainer).items()}
    is_partitioned = trainer.engine.zero_optimization_stage() == 3
    states = trainer.engine.optimizer.optimizer.state
    for key in ("exp_avg", "exp_avg_sq"):
        if is_partitioned:
            for name, parameter in trainable(trainer.model).items():
                found[f"{name}/{key}"] = safe_get_full_optimizer_state(parameter, key).clone()
        else:
            for number, flat in enumerate(trainer.engine.optimizer.single_partition_of_fp32_groups):
                size = sum(parameter.numel() for parameter in trainer.engine.optimizer.bit16_groups[number])
                found[f"{number}/{key}"] = torch.cat(world.all_gather(states[flat][key]))[:size]
    with GatheredParameters(list(trainer.model.parameters()), enabled=is_partitioned):
        found |= {f"{name}/bf16": value.detach().clone() for name, value in trainer.model.named_parameters()}
    return found | {"steps": torch.tensor(sorted({float(state["step"]) for state in states.values()}))}


def note_errors(path: Path, calls: dict[str, Callable[[], None]]) -> None:
    """Write down which error each call ends with, which must be one of the data's, and the disk's error behind it."""
    found = {}
    for name, call in calls.items():
        try:
            call()
        except DataError as error:
            found[name] = [str(error), error.__cause__.errno if isinstance(error.__cause__, OSError) else None]
    path.write_text(json.dumps(found))


def begin(run: Run, stage: str, world: World) -> Trainer:
    """The engine of a stage that has no checkpoint."""
    plan: Any = None
    store: Any = SimpleNamespace(newest=lambda warn: None)
    return resume_trainer(run, run.recipe.stages[stage], world, plan, store, Timeline())[0]


def hand_on(
    folder: Path, strategy: str, world: World, losses: dict[str, list[dict[str, float]]]
) -> dict[str, torch.Tensor]:
    """Train and export the first stage, begin the second and export it too; the masters of both at these moments."""
    run = run_of(folder, strategy)
    connector, instruct = (run.stage_folder(stage) for stage in run.recipe.stages.values())
    model, processor = tiny_model()
    if world.is_main:
        model.bfloat16().save_pretrained(run.initial.export)  # as a run in bf16 builds it
        processor.save_pretrained(run.initial.export)
    world.barrier()
    trainer = begin(run, "connector", world)
    take_step(trainer, micro_batches(4)[world.rank :: world.size], world)
    kept = {f"last/{name}": value for name, value in masters(trainer).items()}
    save_masters(trainer.engine, run.initial, connector, world)
    export_stage(trainer.model, processor, connector.export, world)
    trainer.close()
    trainer = begin(run, "instruct", world)
    kept |= {f"first/{name}": value for name, value in masters(trainer).items()}
    losses[strategy] = [held_out(trainer, world)]
    take_step(trainer, micro_batches(4)[world.rank :: world.size], world)
    kept |= {f"trained/{name}": value for name, value in masters(trainer).items()}
    kept |= {f"saved/{name}": value for name, value in learned(trainer, world).items()}
    with full_disk(20_000) if world.is_main else nullcontext():
        note_errors(folder / f"{strategy}-{world.rank}.json", {
            "masters": lambda: save_masters(trainer.engine, connector, instruct, world),
            "export": lambda: export_stage(trainer.model, processor, instruct.export, world),
        })  # fmt: skip
    save_masters(trainer.engine, connector, instruct, world)
    if world.is_main:
        connector.masters.rename(folder / strategy / "removed")
    save_masters(trainer.engine, connector, instruct, world)  # the frozen ones are those that it wrote before
    save(run, trainer, world, step=1)
    trainer.close()
    return kept


def held_out(trainer: Trainer, world: World) -> dict[str, float]:
    """The held-out loss on packs of which some have images and some have none."""
    filler = collate([], [], step=0, epoch=0)
    mine = [*micro_batches(len(HELD_OUT)), *[filler] * (-len(HELD_OUT) % world.size)][world.rank :: world.size]
    state: Any = SimpleNamespace(trainer=trainer, world=world)
    return measure(state, HeldOutPacks(HELD_OUT, mine))


def main(folder: Path) -> None:
    world = distributed.start(timeout_minutes=2)
    losses: dict[str, list[dict[str, float]]] = {}
    kept = {strategy: hand_on(folder, strategy, world, losses) for strategy in ("cpu_zero3", "zero2")}
    if world.is_main:
        tiny_model()[0].save_pretrained(folder / "model")
    world.barrier()
    results: dict[str, Any] = {"held out": losses}
    for strategy in ("zero1", "zero2", "cpu_zero3"):
        trainer = trainer_of(folder / "model", strategy, world, *SETTINGS, accumulation=MICRO_BATCHES)
        results[strategy] = take_bad_step(trainer, micro_batches(MICRO_BATCHES)[world.rank :: world.size], world)
        learning = sum(getattr(p, "ds_numel", p.numel()) for p in trainer.model.parameters())
        results[f"bucket, {strategy}"] = [trainer.engine.optimizer.reduce_bucket_size, learning]
        trainer.close()
    distributed.stop()
    if not world.is_main:
        return
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name)
    world = distributed.start(timeout_minutes=2)
    for strategy, tensors in kept.items():
        run = run_of(folder, strategy)
        (folder / strategy / "removed").rename(run.stage_folder(run.recipe.stages["connector"]).masters)
        trainer = begin(run, "instruct", world)
        tensors |= {f"alone/{name}": value for name, value in masters(trainer).items()}
        losses[strategy].append(held_out(trainer, world))
        save(run, trainer, world, step=2)
        CheckpointStore(run.folder.path, world, 9, None).load(trainer.engine, saved_by_two(run))
        tensors |= {f"elastic/{name}": value for name, value in learned(trainer, world).items()}
        trainer.close()
        save_file(tensors, folder / f"{strategy}.safetensors")
    reference: dict[str, torch.Tensor] = {}
    for name, extra in {"fp32": {}, "bf16": {"data_types": {"grad_accum_dtype": "bf16"}}}.items():
        trainer = trainer_of(folder / "model", "cpu_zero3", world, *SETTINGS, accumulation=MICRO_BATCHES, **extra)
        reference = reference or expected(folder)
        results[f"error, sums in {name}"] = error(summed(trainer, world), reference)
        trainer.close()
    for part in ("vision", "language"):  # nothing is trained before the first of these layers
        layers = f"stages.connector.trainable=[{part}.*layers.*]"
        trainer = trainer_of(folder / "model", "cpu_zero3", world, *SETTINGS, layers, accumulation=MICRO_BATCHES)
        found = summed(trainer, world)
        assert all("layers." in name for name in found)
        results[f"error, {part} layers alone"] = error(found, reference)
        trainer.close()
    (folder / "results.json").write_text(json.dumps(results))
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
