"""Memory of an estimate: activations against what PyTorch really saves, states against ZeRO's arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, SiglipVisionConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from alignvlm.config import load_recipe
from alignvlm.config.deepspeed import read_strategy
from alignvlm.estimates.memory import Memory, estimate_memory, language_layer_bytes, vision_layer_bytes
from alignvlm.model.network import Dimensions, build_network

TOKENS, SIZE, INNER = 128, 256, 1024
DIMS = Dimensions(
    patches=TOKENS,
    tokens_per_tile=TOKENS,
    tile_size=1,
    vision_size=SIZE,
    vision_inner=INNER,
    vision_layers=1,
    feature_size=SIZE,
    connector="align",
    hidden_size=SIZE,
    inner_size=INNER,
    num_layers=1,
    attention_size=SIZE,
    key_size=SIZE // 4,
    vocab_size=1000,
)


def saved_bytes(module: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes that autograd keeps for the backward pass, parameters not counted, shared storages once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameters:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_of_a_language_layer(dtype: torch.dtype) -> None:
    config = LlamaConfig(
        hidden_size=SIZE,
        intermediate_size=INNER,
        num_attention_heads=8,
        num_key_value_heads=2,
        attn_implementation="sdpa",
    )
    layer = LlamaDecoderLayer(config, 0).to(dtype)
    hidden = torch.randn(1, TOKENS, SIZE, dtype=dtype, requires_grad=True)
    rotary = LlamaRotaryEmbedding(config)(hidden, torch.arange(TOKENS)[None])
    measured = saved_bytes(layer, lambda: layer(hidden, position_embeddings=rotary, attention_mask=None))
    assert language_layer_bytes(DIMS, dtype.itemsize) * TOKENS == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_activations_of_a_vision_layer(dtype: torch.dtype) -> None:
    config = SiglipVisionConfig(hidden_size=SIZE, intermediate_size=INNER, num_attention_heads=8)
    config._attn_implementation = "sdpa"
    layer = SiglipEncoderLayer(config).to(dtype)
    hidden = torch.randn(1, TOKENS, SIZE, dtype=dtype, requires_grad=True)
    measured = saved_bytes(layer, lambda: layer(hidden, attention_mask=None))
    assert vision_layer_bytes(DIMS, dtype.itemsize) * TOKENS == pytest.approx(measured, rel=0.03)


def memory(world_size: int, *overrides: str) -> tuple[Memory, int]:
    recipe = load_recipe("quickstart", ["train.precision=bf16", *overrides])
    stage = next(iter(recipe.stages.values()))
    network = build_network(recipe)
    return estimate_memory(recipe, stage, network, read_strategy(stage), world_size), network.total()


@pytest.mark.parametrize(
    ("strategy", "weights", "gradients", "states"), [("zero1", 1, 1, 8), ("zero2", 1, 8, 8), ("zero3", 8, 8, 8)]
)
def test_model_states_follow_zero(strategy: str, weights: int, gradients: int, states: int) -> None:
    everything = [f"stages.{name}.trainable=['*']" for name in load_recipe("quickstart").stages]
    everything += [f"stages.{name}.lr.default=1e-3" for name in load_recipe("quickstart").stages]
    found, parameters = memory(8, f"train.deepspeed={strategy}", *everything)
    assert found.gpu["weights"] == pytest.approx(2 * parameters / weights)
    assert found.gpu["gradients"] == pytest.approx(2 * parameters / gradients)
    assert found.gpu["fp32 masters"] == pytest.approx(4 * parameters / states)
    assert found.gpu["optimizer states"] == pytest.approx(8 * parameters / states)
    assert not found.host


def test_offloading_moves_states_to_the_host() -> None:
    found, parameters = memory(2, "train.deepspeed=zero3_offload")
    assert "weights" not in found.gpu
    assert "optimizer states" not in found.gpu
    assert found.host["weights"] == pytest.approx(parameters)


def test_zeropp_keeps_a_second_partition() -> None:
    found, parameters = memory(16, "train.deepspeed=zeropp")
    assert found.gpu["secondary weights (hpZ)"] == pytest.approx(2 * parameters / 8)


def test_checkpointing_and_frozen_vision_keep_less() -> None:
    plain, _ = memory(2)
    checkpointed, _ = memory(2, "train.gradient_checkpointing=true")
    for kind in ("vision activations", "language activations"):
        assert checkpointed.gpu[kind] < plain.gpu[kind]
