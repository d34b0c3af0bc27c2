"""Settings that save GPU memory: for an estimate of a stage that does not fit, and for training that ran out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from alignvlm.config.deepspeed import read_strategy
from alignvlm.config.schema import Recipe, RecomputeConfig, StageConfig
from alignvlm.run_folder import may_change


@dataclass(frozen=True)
class Saving:
    """A setting, as an override and as what it changes in the recipe's `train` and in the stage."""

    override: str
    train: dict[str, Any] = field(default_factory=dict)
    stage: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.override.partition("=")[0]


def memory_savings(recipe: Recipe, stage: StageConfig) -> list[Saving]:
    """What a stage could still change to need less of a GPU's memory, the cheapest in time first."""
    own, train = f"stages.{stage.name}", recipe.train
    found = []
    if train.kept_logits_gib:
        found.append(Saving("train.kept_logits_gib=0", {"kept_logits_gib": 0.0}))
    if train.gradient_checkpointing == "auto" or train.recompute != RecomputeConfig(1, 1):
        found.append(Saving("train.gradient_checkpointing=true", {"gradient_checkpointing": True}))
    if stage.micro_batch_packs > 1:
        found.append(Saving(f"{own}.micro_batch_packs=1", {}, {"micro_batch_packs": 1}))
    level = read_strategy(stage).get("zero_optimization", {}).get("stage", 0)
    strategies = [*(["zero3"] if level < 3 else []), "zero3_offload"]
    return found + [Saving(f"{own}.deepspeed={name}", {}, {"deepspeed": name}) for name in strategies]


def changed_recipes(recipe: Recipe, stage: StageConfig) -> Iterator[tuple[list[str], Recipe, StageConfig]]:
    """Overrides with the recipe and stage that they make: each saving alone, then one after the other together."""
    savings = memory_savings(recipe, stage)
    for saving in savings:
        yield _changed(recipe, stage, [saving])
    together: dict[str, Saving] = {}
    for saving in savings:
        together.pop(saving.key, None)  # of two strategies the later one stands, in its place
        together[saving.key] = saving
        yield _changed(recipe, stage, list(together.values()))


def _changed(recipe: Recipe, stage: StageConfig, savings: list[Saving]) -> tuple[list[str], Recipe, StageConfig]:
    train, of_stage = recipe.train, stage
    for saving in savings:
        train, of_stage = replace(train, **saving.train), replace(of_stage, **saving.stage)
    return [saving.override for saving in savings], replace(recipe, train=train), of_stage


@contextmanager
def memory_advice(recipe: Recipe, stage: StageConfig) -> Iterator[None]:
    """Let a GPU's out-of-memory error of a stage end with what saves memory there."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note(_advice(recipe, stage))
        raise


def _advice(recipe: Recipe, stage: StageConfig) -> str:
    savings = memory_savings(recipe, stage)
    now = [saving.override for saving in savings if may_change(saving.key)]
    later = [saving.override for saving in savings if not may_change(saving.key)]
    text = f"alignvlm: stage {stage.name}: the GPU's memory is full."
    if now:
        text += f" Start again with {', or '.join(now)}: the run goes on from its last checkpoint."
    return f"{text} For a new run: {', or '.join(later)}. `alignvlm estimate` says what fits."
