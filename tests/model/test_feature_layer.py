"""`model.vision.feature_layer`: features of an earlier layer, of an encoder that ends with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel

from alignvlm.config import load_recipe
from alignvlm.errors import UserError
from alignvlm.model import AlignVLMForConditionalGeneration
from alignvlm.model.build import build_model
from alignvlm.model.network import build_network
from tests.jobs import TINY
from tests.tiny import tiny_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
NARROW = {"intermediate_size": 48}


@pytest.mark.parametrize(
    ("kind", "sizes"), [("siglip_vision_model", NARROW), ("clip_vision_model", NARROW), ("dinov2", {})]
)
def test_features_are_the_hidden_state_that_transformers_calls_so(
    kind: str, sizes: dict[str, int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    fields = SIZES | sizes
    encoder = AutoModel.from_config(AutoConfig.for_model(kind, **fields), attn_implementation="sdpa").eval()
    encoder.save_pretrained(tmp_path / "encoder")
    pixels = torch.randn(2, 3, 32, 32)
    states = encoder(pixel_values=pixels, output_hidden_states=True)
    settings = [f"model.vision.path={tmp_path / 'encoder'}", f"model.vision.config={fields | {'model_type': kind}}"]
    for layer, expected in ((-1, states.last_hidden_state), (-2, states.hidden_states[-2])):
        recipe = load_recipe(str(TINY), [*settings, "model.tiles.merge=1", f"model.vision.feature_layer={layer}"])
        model = build_model(recipe, tiny_model()[1]).eval()
        torch.testing.assert_close(model.model.encode_tiles(pixels), expected[:, -16:])
        assert model.config.vision_config.num_hidden_layers == 4 + layer
        norms = {"post_layernorm.weight", "layernorm.weight"} & set(model.model.vision_tower.state_dict())
        assert len(norms) == (layer == -1)
    model.save_pretrained(tmp_path / "export")
    again = AlignVLMForConditionalGeneration.from_pretrained(tmp_path / "export")
    torch.testing.assert_close(again.model.encode_tiles(pixels), expected[:, -16:])
    assert again.state_dict().keys() == model.state_dict().keys()


def test_an_estimate_leaves_the_unused_layer_out() -> None:
    whole, cut = (build_network(load_recipe("low_resource_3b", [f"model.vision.feature_layer={n}"])) for n in (-1, -2))
    layer = 4 * (1152**2 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    assert whole.parameters("vision") - cut.parameters("vision") == layer + 2 * 1152  # and the final LayerNorm


def test_a_layer_that_is_not_there_is_an_error() -> None:
    with pytest.raises(UserError, match=r"feature_layer is -28, but the encoder has 27 layers: give -27 to -1"):
        build_network(load_recipe("low_resource_3b", ["model.vision.feature_layer=-28"]))
