"""Recomputed layers: which ones, and that they change no bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from alignvlm.config import load_recipe
from alignvlm.config.schema import RecomputeConfig
from alignvlm.errors import UserError
from alignvlm.model.network import largest_list
from alignvlm.run_folder import Run
from alignvlm.training.engine import recompute_layers
from tests.jobs import TINY
from tests.tiny import pack, samples, tiny_model


@pytest.fixture(scope="module")
def plain() -> tuple[Any, dict[str, Any], float, dict[str, torch.Tensor]]:
    """A model with five language layers, a packed batch, and its loss and gradients without recomputation."""
    model, processor = tiny_model(text={"num_hidden_layers": 5})
    batch = pack([processor.encode(s) for s in samples()])
    model.train()
    return model, batch, *step(model, batch)


def step(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=3).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def runs_per_layer(model: Any) -> Iterator[tuple[str, list[int]]]:
    """How often each layer's first linear map runs in the next step, filled in as it happens."""
    for part in ("vision", "language"):
        layers = largest_list(getattr(model, part))[2]
        runs = [0] * len(layers)
        for number, layer in enumerate(layers):
            first = next(module for module in layer.modules() if isinstance(module, torch.nn.Linear))

            def count(*_: Any, number: int = number, runs: list[int] = runs) -> None:
                runs[number] += 1

            first.register_forward_hook(count)
        yield part, runs


@pytest.mark.parametrize(
    ("vision", "language", "twice"),
    [(1, 1, ([0, 1], [0, 1, 2, 3, 4])), (0, 2, ([], [0, 2, 4])), (2, 3, ([0], [0, 3])), (0, 9, ([], [0]))],
)
def test_every_nth_layer_runs_twice_and_no_bit_changes(
    plain: Any, vision: int, language: int, twice: tuple[list[int], list[int]]
) -> None:
    model, batch, expected, expected_gradients = plain
    recompute_layers(model, RecomputeConfig(vision, language))
    runs = dict(runs_per_layer(model))
    loss, gradients = step(model, batch)
    model.vision.activation_checkpointing_disable()
    model.language.activation_checkpointing_disable()
    found = tuple([number for number, times in enumerate(runs[part]) if times == 2] for part in runs)
    assert found == twice
    assert all(times in (1, 2) for part in runs.values() for times in part)
    assert loss == expected
    assert all(torch.equal(gradient, expected_gradients[name]) for name, gradient in gradients.items())


def test_a_run_may_resume_with_another_degree(tmp_path: Path) -> None:
    def run(*overrides: str) -> Run:
        return Run(load_recipe(str(TINY), [f"runs={tmp_path}", *overrides]))

    run("train.gradient_checkpointing=true").open()
    run("train.gradient_checkpointing.language=2").open()
    assert run().folder.read_config()["train"]["gradient_checkpointing"] == {"vision": 0, "language": 2}
    with pytest.raises(UserError, match=r"model.fused_layers: 'auto' → 'none'"):
        run("model.fused_layers=none").open()
