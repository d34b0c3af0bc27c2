"""Training by one rank in the test's own process: the real engine and step, on a tiny model and fixed micro-batches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param

from alignvlm.config import load_recipe
from alignvlm.training.checkpoints.masters import trainable
from alignvlm.training.engine import Trainer, build_trainer
from alignvlm.training.step import StepResult, Votes, train_step
from data_pipeline.loading.collate import MicroBatch, collate
from tests.jobs import TINY
from tests.tiny import samples, tiny_model


@functools.cache
def _encoded() -> list[Any]:
    processor = tiny_model()[1]
    return [processor.encode(sample) for sample in samples()]


def micro_batches(count: int) -> list[MicroBatch]:
    """Documents with and without images, one or two in each."""
    encoded = _encoded()
    chosen = [[i % 3, i % 2] if i % 4 else [i % 3] for i in range(count)]
    return [collate([encoded[i] for i in row], ["s/0/k"] * len(row), step=0, epoch=0) for row in chosen]


def trainer_of(model: Path, strategy: str, world: Any, *settings: str, accumulation: int = 4, **extra: Any) -> Trainer:
    """A trainer in bf16 of the export folder `model`, for steps of `accumulation` micro-batches.

    Args:
        settings: of the recipe, "key=value".
        extra: added to DeepSpeed's configuration.
    """
    recipe = load_recipe(str(TINY), [
        "train.precision=bf16", f"train.deepspeed={strategy}", "train.processes=1",
        f"stages.connector.global_batch_packs={accumulation}", *settings,
    ])  # fmt: skip
    return build_trainer(recipe, recipe.stages["connector"], model, world, extra)


def take_step(trainer: Trainer, batches: list[MicroBatch], world: Any) -> StepResult:
    """One step with nothing to tell the other ranks."""
    return train_step(trainer, batches, world, 1.0, Votes())


def masters(trainer: Trainer) -> dict[str, torch.Tensor]:
    """fp32 weights of everything that learns, by public name."""
    return {name: safe_get_full_fp32_param(p).clone() for name, p in trainable(trainer.model).items()}


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def take_bad_step(trainer: Trainer, batches: list[MicroBatch], world: Any) -> dict[str, list[int]]:
    """A step whose last rank has NaN visual tokens, then a good one: which were skipped, how many weights changed."""
    before = masters(trainer)
    factor = float("nan") if world.rank == world.size - 1 else 1.0
    hook = trainer.model.model.connector.register_forward_hook(lambda module, inputs, output: output * factor)
    bad = take_step(trainer, batches, world)
    hook.remove()
    between = masters(trainer)
    good = take_step(trainer, batches, world)
    return {
        "skipped": [bad.skipped, good.skipped],
        "changed": [len(differing(before, between)), len(differing(between, masters(trainer)))],
    }
