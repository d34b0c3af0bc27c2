"""Memory of an estimate: activations against what PyTorch really saves, states against ZeRO's arithmetic."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from alignvlm.config import load_recipe
from alignvlm.config.deepspeed import read_strategy
from alignvlm.config.schema import RecomputeConfig
from alignvlm.estimates.activations import Activations
from alignvlm.estimates.memory import GIB, Memory, estimate_memory, stage_memory
from alignvlm.kernels.fused_costs import fuse_on_meta
from alignvlm.kernels.linear import keep_parameters
from alignvlm.model import AlignVLMConfig, AlignVLMForConditionalGeneration
from alignvlm.model.attention import SDPA, Documents
from alignvlm.model.flops import Work
from alignvlm.model.network import build_network, matches, network_of
from alignvlm.parts import public_name
from tests.jobs import ROOT

TOKENS, TILES = 128, 3
SIZES = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8}
TEXT = SIZES | {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 300, "pad_token_id": 0}
VISION = SIZES | {"image_size": 32, "patch_size": 4}


def config_of(text: str, vision: str, connector: dict[str, Any]) -> AlignVLMConfig:
    return AlignVLMConfig(
        vision_config={"model_type": vision, **VISION},
        text_config={"model_type": text, **TEXT},
        connector_config=connector,
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


BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("text", "vision", "connector", "dtype"),
    [
        ("llama", "siglip_vision_model", {"kind": "align"}, BF16),  # in fp32 a CPU has another form of the operator
        ("qwen3", "clip_vision_model", {"kind": "ovis", "visual_vocab_size": 200}, BF16),
        ("qwen2", "siglip_vision_model", {"kind": "mlp"}, FP32),
        ("llama", "clip_vision_model", {"kind": "perceiver", "num_latents": 16}, FP32),
        ("llama", "siglip_vision_model", {"kind": "h_reducer", "window": [1, 3]}, BF16),
        ("llama", "siglip_vision_model", {"kind": "c_abstractor", "num_queries": 16, "hidden_size": 128}, FP32),
    ],
)
def test_activations_are_what_a_real_model_saves(
    text: str, vision: str, connector: dict[str, Any], dtype: torch.dtype
) -> None:
    config = config_of(text, vision, connector)
    network = network_of(config, dtype)
    config.vision_config._attn_implementation, config.text_config._attn_implementation = "sdpa", SDPA
    model = AlignVLMForConditionalGeneration(config).to(dtype).train()  # type: ignore[arg-type]
    tiles = torch.randn(TILES, 3, 32, 32, dtype=dtype)
    features = torch.randn(TILES, 64, 256, dtype=dtype, requires_grad=True)
    embeds = torch.randn(1, TOKENS, 256, dtype=dtype, requires_grad=True)
    documents = {"documents": Documents(torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS)}
    decoder: Any = model.model.language_model
    measured = {
        "vision": saved_bytes(model, lambda: model.model.encode_tiles(tiles)),
        "connector": saved_bytes(model, lambda: model.model.connector(features, model.get_input_embeddings().weight)),
        "language": saved_bytes(model, lambda: decoder(inputs_embeds=embeds, use_cache=False, **documents)),
    }
    activations = Activations(network, RecomputeConfig())
    workspace = network.connector.workspace_bytes(TILES * network.dims.tokens_per_tile)
    assert activations.vision(TILES).kept == pytest.approx(measured["vision"], rel=0.02)
    assert activations.connector(TILES).kept == pytest.approx(measured["connector"], rel=0.02)
    assert activations.connector(TILES).at_work == activations.connector(TILES).kept + workspace
    assert activations.language(TOKENS).kept == pytest.approx(measured["language"], rel=0.02)


@pytest.mark.parametrize("zero3", [False, True])
@pytest.mark.parametrize("trained", [("connector.*",), ("language.layers.2.*",), ("language.*norm*",)])
def test_frozen_weights_keep_no_inputs(trained: tuple[str, ...], zero3: bool) -> None:
    """Neither with PyTorch's linear layers nor with those that ZeRO-3 takes."""
    config = config_of("llama", "siglip_vision_model", {"kind": "mlp"})
    network = network_of(config, BF16)
    config.text_config._attn_implementation = SDPA
    model = AlignVLMForConditionalGeneration(config).to(BF16).train()  # type: ignore[arg-type]
    if zero3:
        keep_parameters(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(matches(public_name(name), trained))
    embeds = torch.randn(1, TOKENS, 256, dtype=BF16, requires_grad=trained[0].startswith("connector"))
    documents = {"documents": Documents(torch.tensor([0, TOKENS], dtype=torch.int32), TOKENS)}
    decoder: Any = model.model.language_model
    measured = saved_bytes(model, lambda: decoder(inputs_embeds=embeds, use_cache=False, **documents))
    found = Activations(network, RecomputeConfig(), trained).language(TOKENS).kept
    assert found == pytest.approx(measured, rel=0.02)
    assert found < 0.8 * Activations(network, RecomputeConfig()).language(TOKENS).kept


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
    assert found.gpu["gradients"] == pytest.approx((2 if strategy == "zero1" else 4) * parameters / gradients)
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


def test_kept_logits_fill_their_budget_with_whole_blocks() -> None:
    plain, _ = memory(2)
    recipe = load_recipe("quickstart")
    stage, network = next(iter(recipe.stages.values())), build_network(recipe)
    row = (
        2
        * (stage.micro_batch_packs * stage.sequence_length // network.dims.tokens_per_tile)
        * (network.dims.tokens_per_tile)
    )
    kept, _ = memory(2, f"train.kept_logits_gib={row * 1.5 * network.dims.vocab_size / 2**30}")
    assert kept.gpu["kept logits"] == row * network.dims.vocab_size
    assert kept.gpu_total == plain.gpu_total + kept.gpu["kept logits"]
    assert "kept logits" not in memory(2, f"train.kept_logits_gib={row / 2**30}")[0].gpu


def test_of_a_lora_stage_adapters_alone_learn() -> None:
    """Weights once more the adapters' own, gradients and states of these only."""
    shape = {"rank": 4, "targets": ["language.*q_proj", "language.*down_proj"]}
    stage = next(iter(load_recipe("quickstart").stages))
    overrides = [f"stages.{stage}={json.dumps({'trainable': [], 'lora': shape, 'lr': {'default': 1e-3}})}"]
    found, parameters = memory(4, "train.deepspeed=zero3", *overrides)
    text = load_recipe("quickstart").model.language.config
    width, heads = text["hidden_size"], text["num_attention_heads"]
    query = heads * text.get("head_dim", width // heads)
    adapters = 4 * text["num_hidden_layers"] * (width + query + text["intermediate_size"] + width)
    assert found.gpu["weights"] == pytest.approx(2 * (parameters + adapters) / 4)
    assert found.gpu["gradients"] == found.gpu["fp32 masters"] == pytest.approx(4 * adapters / 4)
    assert found.gpu["optimizer states"] == pytest.approx(8 * adapters / 4)
    recipe = load_recipe("quickstart", ["train.precision=bf16", *overrides])
    adapted = build_network(recipe).of_stage(recipe.stages[stage]).model
    assert {p.dtype for p in adapted.parameters()} == {BF16}  # and with fp32 inputs of adapters, twice the activations


def test_checkpointing_and_frozen_vision_keep_less() -> None:
    plain, _ = memory(2)
    checkpointed, _ = memory(2, "train.gradient_checkpointing=true")
    for kind in ("vision activations", "language activations"):
        assert checkpointed.gpu[kind] < plain.gpu[kind]


def test_a_degree_keeps_what_is_not_recomputed() -> None:
    """Of six equal layers, one in three: four keep theirs, two their input; all six at once when nothing recomputes."""
    text = TEXT | {"num_hidden_layers": 6}
    network = network_of(
        AlignVLMConfig(vision_config={"model_type": "siglip_vision_model", **VISION}, text_config=text)
    )
    held = {every: Activations(network, RecomputeConfig(0, every)).language(TOKENS) for every in (0, 1, 3, 6)}
    inputs = TOKENS * TEXT["hidden_size"] * 2
    layer = (held[0].kept - held[1].kept) / 6 + inputs
    assert held[1].at_work == pytest.approx(held[1].kept + layer)
    assert held[0].at_work == held[0].kept
    assert held[3].kept == held[3].at_work == pytest.approx(held[0].kept - 2 * layer + 2 * inputs)
    assert held[6].kept == pytest.approx(held[0].kept - layer + inputs)


@pytest.mark.parametrize(
    ("result", "variant", "in_bucket", "overrides"),
    [
        ("train-cuda", "default", True, ["train.gradient_checkpointing=true"]),
        ("train-cuda", "no-checkpointing", True, ["train.gradient_checkpointing=false"]),
        ("train-cuda", "no-checkpointing+gradients-in-place", False, ["train.gradient_checkpointing=false"]),
        (
            "train-cuda-variants", "no-checkpointing+kept-logits", True,
            ["train.gradient_checkpointing=false", "train.kept_logits_gib=8"],
        ),
    ],
)  # fmt: skip
def test_the_estimate_is_what_an_h100_measured(
    result: str, variant: str, in_bucket: bool, overrides: list[str]
) -> None:
    """benchmarks/train.py notes what torch's allocator held at most; CUDA's own memory is not in it."""
    rows = json.loads((ROOT / "benchmarks" / "results" / f"{result}.json").read_text())["rows"]
    row = next(row for row in rows if row["variant"] == variant)
    recipe = load_recipe("paper_llama32_1b", overrides)
    stage, network = recipe.stages["alignment"], build_network(recipe)
    fuse_on_meta(network.model)
    packs = 4
    work = Work(*(row[key] / packs for key in ("tokens", "tiles", "supervised", "attended")))
    strategy = read_strategy(stage)
    strategy["zero_optimization"]["contiguous_gradients"] = in_bucket
    found = stage_memory(recipe, stage, network, strategy, 1, work).of(recipe.train.recompute)
    assert (found.gpu_total - found.gpu["runtime"]) / GIB == pytest.approx(row["peak_gib"], rel=0.04)


def test_gradients_wait_in_a_bucket_and_are_copied_for_their_reduction() -> None:
    """1.9 billion parameters learn on two GPUs: a bucket is full after two fifths of the language model's backward."""
    recipe = load_recipe("paper_llama32_1b", ["train.gradient_checkpointing=true"])
    stage, network = recipe.stages["alignment"], build_network(recipe)
    strategy = read_strategy(stage)
    bucket = strategy["zero_optimization"]["reduce_bucket_size"]
    there = stage_memory(recipe, stage, network, strategy, 2)
    strategy["zero_optimization"]["contiguous_gradients"] = True
    copied = stage_memory(recipe, stage, network, strategy, 2)
    assert there.reduction == bucket * (2 + 2 + 4 / 2)
    assert copied.reduction == bucket * (2 + 4 / 2)
    kind = "gathered weights, buckets"
    assert copied.standing[kind] - there.standing[kind] == 2 * bucket
    assert there.until_reduction == bucket / network.parameters("language", stage.trained)
    assert there.of(recipe.train.recompute).gpu_total == copied.of(recipe.train.recompute).gpu_total


def test_a_frozen_language_model_reduces_nothing() -> None:
    settings = ["train.gradient_checkpointing=true", "stages.alignment.trainable=[connector.*]"]
    recipe = load_recipe("paper_llama32_1b", settings)
    stage = recipe.stages["alignment"]
    found = stage_memory(recipe, stage, build_network(recipe), read_strategy(stage), 2)
    assert found.until_reduction > 1
    assert 0 < found.reduction < 6 * read_strategy(stage)["zero_optimization"]["reduce_bucket_size"]
