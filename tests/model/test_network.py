"""Parameter counts of an estimate are those of the real models."""

from __future__ import annotations

import pytest

from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from alignvlm.model.network import build_network

PUBLISHED_LANGUAGE = {
    "paper_llama32_1b": 1_235_814_400,
    "paper_llama32_3b": 3_212_749_824,
    "paper_llama31_8b": 8_030_261_248,
}
"""As the model cards' weights count, tied embeddings once."""
W2 = {"paper_llama32_1b": 262_668_288, "paper_llama32_3b": 394_002_432, "paper_llama31_8b": 525_336_576}


@pytest.mark.parametrize("name", PUBLISHED_LANGUAGE)
def test_language_models_have_their_published_size(name: str) -> None:
    network = build_network(load_recipe(name))
    assert network.parameters("language") == PUBLISHED_LANGUAGE[name]
    assert network.connector.w2.numel() == W2[name]
    assert all(parameter.is_meta for parameter in network.model.parameters())


def test_counts_equal_the_built_model() -> None:
    from alignvlm.model.modeling import AlignVLMForConditionalGeneration

    network = build_network(load_recipe("quickstart"))
    real = AlignVLMForConditionalGeneration(network.model.config)
    assert network.total() == sum(parameter.numel() for parameter in real.parameters())
    for part in ("vision", "connector", "language"):
        modules = [real.model.part(part), *([real.lm_head] if part == "language" else [])]
        assert network.parameters(part) == sum(p.numel() for module in modules for p in module.parameters())


def test_trainable_globs_select_parameters() -> None:
    network = build_network(load_recipe("quickstart"))
    assert network.total(["connector.w2"]) == network.connector.w2.numel()
    assert network.total(["connector.*", "vision.*"]) == network.parameters("connector") + network.parameters("vision")


def test_visual_tokens_of_a_tile() -> None:
    assert build_network(load_recipe("paper_llama32_1b")).dims.tokens_per_tile == 729
    merged = build_network(load_recipe("paper_llama32_1b", ["model.tiles.merge=3"])).dims
    assert (merged.tokens_per_tile, merged.feature_size) == (81, 1152 * 9)
    padded = build_network(load_recipe("paper_llama32_1b", ["model.tiles.merge=2"])).dims  # 27 patches, filled to 28
    assert (padded.tokens_per_tile, padded.feature_size) == (196, 1152 * 4)
    kind = ["model.connector.kind=perceiver", "model.connector.num_latents=32"]
    assert build_network(load_recipe("quickstart", kind)).dims.tokens_per_tile == 32


def test_shapes_that_are_not_here_are_asked_for() -> None:
    for part in ("vision", "language"):
        recipe = load_recipe("paper_llama32_1b")
        getattr(recipe.model, part).config.clear()
        with pytest.raises(UserError, match=rf"state model\.{part}\.config"):
            build_network(recipe)
    with pytest.raises(UserError, match=r"model\.language\.config: model_type is missing"):
        build_network(load_recipe("paper_llama32_1b", ["model.language.config={model_type: null}"]))
    with pytest.raises(UserError, match=r"'lama' is unknown to transformers; did you mean .*llama"):
        build_network(load_recipe("paper_llama32_1b", ["model.language.config={model_type: lama}"]))
    with pytest.raises(UserError, match="merge"):
        build_network(load_recipe("paper_llama32_1b", ["model.tiles.merge=28"]))
