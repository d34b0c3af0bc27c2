"""FLOPs of an estimate against PyTorch's own counter on real forward and backward passes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from alignvlm.config import load_recipe
from alignvlm.kernels import vocab_softmax
from alignvlm.model.flops import Work, training_flops
from alignvlm.model.modeling import AlignVLMForConditionalGeneration
from alignvlm.model.network import Network, build_network

TILES, TEXT = 3, 40


def network_of(*overrides: str) -> Network:
    return build_network(load_recipe("quickstart", overrides))


def work_of(network: Network) -> Work:
    tokens = TILES * network.dims.tokens_per_tile + TEXT
    return Work(tokens, TILES, TEXT, tokens**2)


def counted(network: Network, trainable: list[str]) -> tuple[int, int]:
    """(forward, backward) of one unpacked document, counted while it runs on the CPU."""
    config = network.model.config
    config._attn_implementation = "sdpa"
    model = AlignVLMForConditionalGeneration(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name.startswith(prefix) for prefix in trainable))
    visual = TILES * network.dims.tokens_per_tile
    image = config.image_token_id = network.dims.vocab_size - 1
    input_ids = torch.full((1, visual + TEXT), 5)
    input_ids[0, :visual] = image
    labels = torch.full_like(input_ids, -100)
    labels[0, visual:] = 5
    size = network.dims.tile_size
    tiles = torch.zeros(TILES, 3, size, size, dtype=torch.uint8)
    # The counter does not know the fused attention of CPUs; the plain one does the same products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        embeds = model.embed(input_ids, tiles)
        hidden = model.language.get_decoder()(inputs_embeds=embeds).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.get_output_embeddings()(hidden[0, visual:]), labels[0, visual:])
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


OPTIONS = {"mlp": [], "perceiver": ["model.connector.num_heads=4"]}


@pytest.mark.parametrize("connector", list(OPTIONS))
@pytest.mark.parametrize(
    "trainable", [["vision.", "connector.", "language."], ["connector.", "language."], ["connector."]]
)
def test_model_flops_are_those_that_pytorch_counts(connector: str, trainable: list[str]) -> None:
    network = network_of(f"model.connector.kind={connector}", *OPTIONS[connector])
    planned = training_flops(network, work_of(network), [f"{prefix}*" for prefix in trainable])
    forward, backward = counted(network, trainable)
    assert sum(part.forward for part in planned.values()) == pytest.approx(forward, rel=0.02)
    assert sum(part.backward for part in planned.values()) == pytest.approx(backward, rel=0.05)


@pytest.mark.parametrize("frozen", ["", "w2", "e"])
def test_align_flops_are_those_of_its_plain_form(frozen: str) -> None:
    network = network_of()
    dims = network.dims
    visual = TILES * dims.tokens_per_tile
    h = torch.randn(visual, dims.hidden_size, requires_grad=True)
    w2 = torch.randn(dims.vocab_size, dims.hidden_size, requires_grad=frozen != "w2")
    e = torch.randn(dims.vocab_size, dims.hidden_size, requires_grad=frozen != "e")
    with FlopCounterMode(display=False) as forward:
        out = vocab_softmax(h, w2, e, implementation="reference")
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    trainable = ["vision.*", "connector.w1.*"]
    trainable += ["connector.w2"] if frozen != "w2" else []
    trainable += ["language.*"] if frozen != "e" else []
    planned = training_flops(network, work_of(network), trainable)["connector"]
    w1 = 2 * visual * dims.feature_size * dims.hidden_size
    assert planned.forward - w1 == forward.get_total_flops()
    assert planned.backward - 2 * w1 == backward.get_total_flops()


def test_frozen_parts_before_the_first_that_learns_cost_nothing_backward() -> None:
    network = network_of()
    planned = training_flops(network, work_of(network), ["language.*"], checkpointing=True)
    assert planned["vision"].backward == planned["vision"].recomputed == 0
    assert planned["connector"].backward > 0  # its output averages the embedding, which learns
    assert planned["language"].recomputed == planned["language"].forward
    nothing_but_w2 = training_flops(network, work_of(network), ["connector.w2"])
    assert nothing_but_w2["language"].backward == pytest.approx(planned["language"].forward, rel=0.3)
