"""The estimate's fullest moment of a step against what lives at once: the paper's shapes, run on the meta device."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from alignvlm.config import load_recipe
from alignvlm.config.deepspeed import read_strategy
from alignvlm.config.schema import RecomputeConfig
from alignvlm.estimates.memory import GIB, StageMemory, stage_memory
from alignvlm.kernels.fused_costs import fuse_on_meta
from alignvlm.kernels.linear import keep_parameters
from alignvlm.model.network import build_network, largest_list
from alignvlm.training.engine import recompute_layers
from tests.fixtures.live_bytes import LiveBytes


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention saves no scores, and products add to fp32 in place."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, *_, **__: attend(q, k, v)[0]
    )
    loss = importlib.import_module("alignvlm.kernels.linear_cross_entropy")  # its package has a function of this name
    monkeypatch.setattr(loss, "accumulate", lambda acc, a, b: None)


def release_layer_by_layer(model: Any, layers: list[torch.nn.Module]) -> None:
    """Free gradients as ZeRO-3 does: a layer's when the next one's come, all others at once."""
    owner = {parameter: layer for layer in layers for parameter in layer.parameters()}
    held: list[torch.Tensor | None] = []
    last: list[Any] = [None]

    def release(parameter: torch.nn.Parameter) -> None:
        if owner.get(parameter, parameter) is not last[0]:
            held.clear()
            last[0] = owner.get(parameter, parameter)
        held.append(parameter.grad)
        parameter.grad = None

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(release)


def take_micro_batch(memory: StageMemory, recompute: RecomputeConfig) -> int:
    """Bytes that live at the fullest moment of the micro-batch for which the memory is estimated."""
    network, work = memory.network, memory.work
    model: Any = network.model
    recompute_layers(model, recompute)
    keep_parameters(model)
    network.set_trainable(memory.trained)
    release_layer_by_layer(
        model, [layer for part in ("vision", "language") for layer in largest_list(network.part(part))[2]]
    )
    num_tokens, num_tiles = int(work.tokens), int(work.tiles)
    numbers = lambda *shape: torch.empty(*shape, dtype=torch.int64, device="meta")
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        size = network.dims.tile_size
        model(
            input_ids=numbers(1, num_tokens),
            pixel_values=torch.empty(num_tiles, 3, size, size, dtype=torch.uint8, device="meta"),
            position_ids=numbers(1, num_tokens),
            cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
            max_seqlen=num_tokens,
            visual_positions=numbers(num_tiles * network.dims.tokens_per_tile),
            target_positions=numbers(int(work.supervised)),
            targets=numbers(int(work.supervised)),
            num_items_in_batch=1.0,
        ).loss.backward()
    return live.most


@pytest.mark.parametrize(
    ("name", "stage", "recompute"),
    [
        ("paper_llama32_1b", "documents", RecomputeConfig(0, 0)),
        ("paper_llama32_1b", "instructions", RecomputeConfig(0, 3)),  # the encoder is frozen
        ("low_resource_3b", "alignment", RecomputeConfig(0, 0)),  # only the connector learns
    ],
)
def test_the_fullest_moment_is_as_estimated(name: str, stage: str, recompute: RecomputeConfig) -> None:
    """Without ALIGN, whose form on the meta device holds N x V; `test_memory.py` has it, as measured on an H100."""
    recipe = load_recipe(name, ["model.connector={kind: mlp}"])
    network = build_network(recipe)
    fuse_on_meta(network.model)
    memory = stage_memory(recipe, recipe.stages[stage], network, read_strategy(recipe.stages[stage]), 1)
    parts = memory.of(recompute).gpu
    estimated = sum(parts[f"{part} activations"] for part in ("vision", "connector", "language")) + parts["at work"]
    assert estimated / GIB == pytest.approx(take_micro_batch(memory, recompute) / GIB, rel=0.03)
