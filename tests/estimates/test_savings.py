"""What is proposed where a GPU's memory does not suffice."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import alignvlm
from alignvlm.config.schema import Recipe
from alignvlm.estimates.savings import changed_recipes, memory_advice, memory_savings
from alignvlm.training import run as run_module
from alignvlm.training.run import _train


def recipe_of(*overrides: str) -> Recipe:
    return alignvlm.load_recipe("paper_llama32_1b", list(overrides))


def test_savings_are_those_that_a_stage_has_left() -> None:
    recipe = recipe_of("train.kept_logits_gib=2", "train.gradient_checkpointing=auto")
    assert [saving.override for saving in memory_savings(recipe, recipe.stages["alignment"])] == [
        "train.kept_logits_gib=0",
        "train.gradient_checkpointing=true",
        "stages.alignment.deepspeed=zero3_offload",
    ]
    recipe = recipe_of("stages.alignment.micro_batch_packs=2", "stages.alignment.deepspeed=zero2")
    assert [saving.override for saving in memory_savings(recipe, recipe.stages["alignment"])] == [
        "stages.alignment.micro_batch_packs=1",
        "stages.alignment.deepspeed=zero3",
        "stages.alignment.deepspeed=zero3_offload",
    ]


def test_each_saving_comes_alone_and_then_together_and_changes_what_it_says() -> None:
    recipe = recipe_of("stages.alignment.micro_batch_packs=2", "stages.alignment.deepspeed=zero2")
    found = list(changed_recipes(recipe, recipe.stages["alignment"]))
    own = "stages.alignment"
    assert [texts for texts, _, _ in found[3:]] == [
        [f"{own}.micro_batch_packs=1"],
        [f"{own}.micro_batch_packs=1", f"{own}.deepspeed=zero3"],
        [f"{own}.micro_batch_packs=1", f"{own}.deepspeed=zero3_offload"],
    ]
    for texts, changed, stage in found:
        loaded = recipe_of(f"{own}.micro_batch_packs=2", f"{own}.deepspeed=zero2", *texts)
        assert stage == loaded.stages["alignment"]
        assert changed.train == loaded.train


def test_an_error_for_lack_of_memory_says_what_saves_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage raises what PyTorch raises on a GPU; launchers treat it as any other error, for a restart may help."""

    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    recipe = recipe_of("train.gradient_checkpointing=false", "train.kept_logits_gib=1")
    for name in ("run_processor", "evaluate_stage"):
        monkeypatch.setattr(run_module, name, lambda *_: None)
    monkeypatch.setattr(run_module, "train_stage", out_of_memory)
    world: Any = SimpleNamespace(is_main=True, broadcast=lambda value: value)
    run: Any = SimpleNamespace(recipe=recipe, initial=None, stage_folder=lambda _: SimpleNamespace(has_export=False))
    timeline: Any = SimpleNamespace(enter=lambda _: None)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as raised:
        _train(run, world, None, None, (), timeline)  # type: ignore[arg-type]
    assert raised.value.__notes__ == [
        "alignvlm: stage alignment: the GPU's memory is full. Start again with train.kept_logits_gib=0, or "
        "train.gradient_checkpointing=true: the run goes on from its last checkpoint. For a new run: "
        "stages.alignment.deepspeed=zero3_offload. `alignvlm estimate` says what fits."
    ]


def test_what_a_run_may_not_change_is_for_a_new_one() -> None:
    recipe = recipe_of("train.kept_logits_gib=0", "train.gradient_checkpointing=true")
    with pytest.raises(torch.OutOfMemoryError) as raised, memory_advice(recipe, recipe.stages["alignment"]):
        raise torch.OutOfMemoryError("full")
    assert "is full. For a new run: stages.alignment.deepspeed=zero3_offload. " in raised.value.__notes__[0]
