"""FLOPs counted on the meta device against a count while real models run, and against figures of the paper's runs."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from alignvlm.config import load_recipe
from alignvlm.config.schema import RecomputeConfig
from alignvlm.kernels import vocab_softmax
from alignvlm.model.flops import PartFlops, Work, count_flops
from alignvlm.model.modeling import AlignVLMForConditionalGeneration
from alignvlm.model.network import Network, build_network
from alignvlm.parts import public_name
from alignvlm.training.engine import recompute_layers

TILES, TEXT = 3, 40


def network_of(*overrides: str) -> Network:
    return build_network(load_recipe("quickstart", overrides))


def work_of(network: Network) -> Work:
    tokens = TILES * network.dims.tokens_per_tile + TEXT
    return Work(tokens, TILES, TEXT, tokens**2)


def flops_of(network: Network, trainable: list[str], *recompute: int) -> dict[str, PartFlops]:
    return count_flops(network, trainable, RecomputeConfig(*recompute)).of(work_of(network))


def counted(network: Network, trainable: list[str], recompute: RecomputeConfig | None = None) -> tuple[int, int]:
    """(forward, backward) of one unpacked document, counted while it runs on the CPU."""
    config = network.model.config
    config._attn_implementation = "sdpa"
    model = AlignVLMForConditionalGeneration(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(public_name(name).startswith(prefix) for prefix in trainable))
    recompute_layers(model, recompute or RecomputeConfig())
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
        embeds = model.model.embed(input_ids, tiles)
        hidden = model.model.language_model(inputs_embeds=embeds).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[0, visual:]), labels[0, visual:])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


MODELS = {
    "mlp": ["model.connector.kind=mlp"],
    "perceiver": ["model.connector.kind=perceiver"],
    "qwen3": [
        "model.connector.kind=mlp",
        "model.language.config={model_type: qwen3, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 3, "
        "num_attention_heads: 4, num_key_value_heads: 2, head_dim: 32}",
    ],
    "clip": [
        "model.connector.kind=mlp",
        "model.vision.position_std=null",
        "model.vision.config={model_type: clip_vision_model, hidden_size: 96, intermediate_size: 192, "
        "num_hidden_layers: 3, num_attention_heads: 3, image_size: 48, patch_size: 8}",
    ],
}


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize(
    "trainable", [["vision.", "connector.", "language."], ["connector.", "language."], ["connector."]]
)
def test_model_flops_are_those_of_a_real_run(model: str, trainable: list[str]) -> None:
    network = network_of(*MODELS[model])
    estimated = flops_of(network, [f"{prefix}*" for prefix in trainable])
    forward, backward = counted(network, trainable)
    assert sum(part.forward for part in estimated.values()) == pytest.approx(forward, rel=1e-3)
    assert sum(part.backward for part in estimated.values()) == pytest.approx(backward, rel=1e-3)


@pytest.mark.parametrize("model", list(MODELS))
@pytest.mark.parametrize("trainable", [["vision.", "connector.", "language."], ["connector."], ["language."]])
def test_recomputed_flops_are_those_of_a_real_run(model: str, trainable: list[str]) -> None:
    network = network_of(*MODELS[model])
    estimated = flops_of(network, [f"{prefix}*" for prefix in trainable], 1, 1)
    (_, once), (_, twice) = counted(network, trainable), counted(network, trainable, RecomputeConfig(1, 1))
    assert sum(part.recomputed for part in estimated.values()) == pytest.approx(twice - once, rel=1e-3)


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
    estimated = flops_of(network, trainable)["connector"]
    w1 = 2 * visual * dims.feature_size * dims.hidden_size
    assert estimated.forward - w1 == forward.get_total_flops()
    assert estimated.backward - 2 * w1 == backward.get_total_flops()
    assert estimated.recomputed == 2 * h.numel() * dims.vocab_size


def test_frozen_parts_before_the_first_that_learns_cost_nothing_backward() -> None:
    network = network_of()
    estimated = flops_of(network, ["language.*"], 1, 1)
    assert estimated["vision"].backward == estimated["vision"].recomputed == 0
    assert estimated["connector"].backward > 0  # its output averages the embedding, which learns
    dims, language = network.dims, network.model.config.text_config
    head = 2 * TEXT * dims.hidden_size * dims.vocab_size
    last = 2 * work_of(network).tokens * language.intermediate_size * dims.hidden_size * language.num_hidden_layers
    assert estimated["language"].recomputed == pytest.approx(estimated["language"].forward - head - last)
    nothing_but_w2 = flops_of(network, ["connector.w2"])
    assert nothing_but_w2["language"].backward == pytest.approx(estimated["language"].forward, rel=0.3)


def test_recomputed_flops_follow_the_degree() -> None:
    network = network_of("model.language.config.num_hidden_layers=5", "model.vision.config.num_hidden_layers=4")
    whole, some = flops_of(network, ["*"], 1, 1), flops_of(network, ["*"], 3, 2)
    assert some["vision"].recomputed == pytest.approx(2 / 4 * whole["vision"].recomputed)
    assert some["language"].recomputed == pytest.approx(3 / 5 * whole["language"].recomputed)
    assert flops_of(network, ["*"])["language"].recomputed == 0
    assert {part: flops.model for part, flops in some.items()} == {part: flops.model for part, flops in whole.items()}


@pytest.mark.parametrize("trainable", ["*", "language.model.layers.1.*"])
def test_two_layers_speak_for_all_that_are_equal(trainable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignvlm.model import flops
    from alignvlm.model.network import PerLayer

    network = network_of("model.language.config.num_hidden_layers=5", "model.vision.config.num_hidden_layers=4")
    few = flops_of(network, [trainable])
    monkeypatch.setattr(flops, "measure_layers", lambda part, measure: PerLayer(measure(), 1, 0.0))
    assert few == flops_of(network, [trainable])


DOCUMENTS = Work(tokens=4.749e10, tiles=6.0e7, supervised=3.75e9, attended=3.0070668e14)
RESAMPLED = Work(tokens=7590000000.0, tiles=60000000.0, supervised=3750000000.0, attended=7681080000000.0)
PAPER = [
    (
        "paper_llama32_1b", "align", DOCUMENTS,
        {"vision": (3.998688685056e19, 7.997377370112e19), "connector": (4.616283488256e19, 9.232566976512e19),
         "language": (1.338072367104e20, 2.676144734208e20)},
    ),
    (
        "paper_llama32_3b", "mlp", DOCUMENTS,
        {"vision": (3.998688685056e19, 7.997377370112e19), "connector": (1.13515167744e18, 2.27030335488e18),
         "language": (3.7412535730176e20, 7.4825071460352e20)},
    ),
    (
        "paper_llama31_8b", "ovis", DOCUMENTS,
        {"vision": (3.998688685056e19, 7.997377370112e19), "connector": (3.76090656768e18, 7.52181313536e18),
         "language": (8.2449291804672e20, 1.64898583609344e21)},
    ),
    (
        "paper_llama31_8b", "perceiver", RESAMPLED,
        {"vision": (3.998688685056e19, 7.997377370112e19), "connector": (7.9235383296e17, 1.58470766592e18),
         "language": (1.1391322816512e20, 2.2782645633024e20)},
    ),
]  # fmt: skip
"""The second stage of the paper's recipes, everything learning: forward and backward by formulas written by hand."""


@pytest.mark.parametrize(("recipe", "kind", "work", "expected"), PAPER)
def test_paper_recipes_need_what_formulas_say(
    recipe: str, kind: str, work: Work, expected: dict[str, tuple[float, float]]
) -> None:
    found = count_flops(build_network(load_recipe(recipe, [f"model.connector.kind={kind}"]))).of(work)
    for part, (forward, backward) in expected.items():
        assert found[part].forward == pytest.approx(forward, rel=1e-6)
        assert found[part].backward == pytest.approx(backward, rel=1e-3)  # no gradient of pixels


D, H = 1152, 1024
"""Width of SigLIP-400M's features, and channels of the C-Abstractor."""
POOLING = 12 * 27 * 27 * H + 12 * 27 * 12 * H
REDUCED = {
    "h_reducer": (189 * (16 * D**2 + 4 * D**2 + D * 3072), 0),
    "c_abstractor": (
        729 * (2 * D * H + 9 * H + H**2) + 2 * 288 * H  # the first block, with its shortcut
        + (2 * 729 + 3 * 144) * (2 * H**2 + 9 * H) + 5 * 2 * 256 * H
        + 144 * (H * 3072 + 3072**2),
        POOLING,
    ),
}  # fmt: skip
"""Kind -> multiply-adds of a tile's forward pass: (those of layers that learn, those of a pooling without weights)."""


@pytest.mark.parametrize("kind", REDUCED)
def test_connectors_that_reduce_need_what_formulas_say(kind: str) -> None:
    learned, fixed = REDUCED[kind]
    network = build_network(load_recipe("low_resource_3b", [f"model.connector.kind={kind}"]))
    found = count_flops(network).of(Work(0, 1, 0, 0))["connector"]
    assert (found.forward, found.backward) == (2 * (learned + fixed), 2 * (2 * learned + fixed))
