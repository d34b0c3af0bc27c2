"""A micro-batch computed twice: against plain autograd, with a flipped bit, and without a trace in the training."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from alignvlm.config.schema import Recipe
from alignvlm.model.attention import SDPA
from alignvlm.training.callbacks.health.replay import Replay, loss_and_norm
from alignvlm.training.step import inputs_of
from data_pipeline.errors import DataError
from tests.one_rank import micro_batches
from tests.tiny import tiny_model
from tests.training.fakes import stage_state

CPU = torch.device("cpu")


@pytest.fixture
def trainer() -> Any:
    engine = SimpleNamespace(zero_optimization_partition_weights=lambda: False)
    model = tiny_model()[0].train()
    model.get_decoder().set_attn_implementation(SDPA)
    return SimpleNamespace(model=model, same_weights=nullcontext, engine=engine)


def test_the_loss_and_the_norm_are_those_of_plain_autograd(trainer: Any) -> None:
    batch, model, kept = micro_batches(2)[1], trainer.model, []

    def keep(module: Any, inputs: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    for module in (model.model.vision_tower.get_input_embeddings(), model.get_input_embeddings()):
        module.register_forward_hook(keep)
    loss = model(**inputs_of(batch), num_items_in_batch=batch.num_supervised).loss
    loss.backward()
    gradients = [kept[0].grad, next(output.grad for output in kept[1:] if output.grad is not None)]
    model.zero_grad()
    found = loss_and_norm(trainer, batch, CPU)
    assert found[0] == loss.item()
    assert found[1] == pytest.approx(torch.cat([g.double().flatten() for g in gradients]).norm().item(), rel=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_frozen_encoder_is_left_out_and_nothing_is_trained_without_any_place(trainer: Any) -> None:
    batch, model = micro_batches(2)[1], trainer.model
    whole = loss_and_norm(trainer, batch, CPU)
    model.model.vision_tower.requires_grad_(False)
    assert 0 < loss_and_norm(trainer, batch, CPU)[1] < whole[1]
    model.requires_grad_(False)
    assert loss_and_norm(trainer, batch, CPU) == (whole[0], 0.0)


def test_a_bit_that_differs_ends_the_run_and_names_the_rank(recipe: Recipe, tmp_path: Path, trainer: Any) -> None:
    looking = replace(recipe, resilience=replace(recipe.resilience, replay_every=5))
    state, batches = stage_state(looking, tmp_path, step=4, trainer=trainer), micro_batches(2)[1:]
    random, calls = torch.get_rng_state(), [0]

    def flip(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            output.view(torch.int32)[...] ^= 1 << 8
        return output

    Replay().before_step(state, batches)
    assert torch.equal(torch.get_rng_state(), random)
    broken = trainer.model.model.language_model.norm.register_forward_hook(flip)
    state.step = 5
    Replay().before_step(state, batches)
    assert calls == [0]  # step 6 is none of the fifth ones
    state.step = 9
    with pytest.raises(DataError, match=r"^rank 0 on \S+ computes wrongly: the same micro-batch of step 10") as raised:
        Replay().before_step(state, batches)
    assert isinstance(raised.value.__cause__, OSError)  # exit code 1
    broken.remove()
    Replay().before_step(state, batches)
