"""A tiny model and inputs for it, as transformers' testers ask for them."""

from __future__ import annotations

import unittest
import unittest.mock
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from alignvlm.model import AlignVLMConfig, AlignVLMForConditionalGeneration, AlignVLMModel
from tests.conformance.testers import load

common = load("test_modeling_common")
# A model of transformers stands in these tables, where the testers look up which one has which labels.
modeling_auto.MODEL_MAPPING_NAMES["alignvlm"] = "AlignVLMModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["alignvlm"] = "AlignVLMForConditionalGeneration"


class Tiny:
    """What a tester asks for a config and inputs."""

    batch_size = 7
    """The most that a tester takes: it would fill up a smaller batch with rows without an image's tokens."""
    seq_length = 11
    image_token_id = 98
    """The last id of the vocabulary."""
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    image_size, patch_size = 16, 8
    is_training = True
    has_images = True

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent

    def get_config(self) -> AlignVLMConfig:
        """Two layers each of SigLIP and Llama, four visual tokens per tile."""
        sizes: dict[str, Any] = {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        }  # fmt: skip
        return AlignVLMConfig(
            vision_config=AutoConfig.for_model(
                "siglip_vision_model", **sizes, image_size=16, patch_size=8, vision_use_head=False
            ),
            text_config=sizes
            | {
                "model_type": "llama", "num_key_value_heads": 2, "vocab_size": 99, "pad_token_id": 0,
                "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
            },
            connector_config={"kind": "align"},
            tiles_config={"max_tiles": 1},
            image_token_id=self.image_token_id,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[AlignVLMConfig, dict[str, torch.Tensor]]:
        """One tile and some text in each row; without images text alone, and padding in the first row."""
        config = self.get_config()
        input_ids = torch.randint(3, 90, (self.batch_size, self.seq_length))
        if not self.has_images:
            mask = torch.ones_like(input_ids)
            mask[0, :3] = 0
            return config, {"input_ids": input_ids, "attention_mask": mask}
        input_ids[:, 1:5] = config.image_token_id
        size = (self.batch_size, 3, self.image_size, self.image_size)
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(size),
        }


class ModelTest(unittest.TestCase):
    """What the testers of models and of `generate` need to know of ours; the first base class, before theirs."""

    all_model_classes = (AlignVLMModel, AlignVLMForConditionalGeneration)
    additional_model_inputs = ("pixel_values",)
    _is_composite = True
    all_generative_model_classes = (AlignVLMForConditionalGeneration,)

    def setUp(self) -> None:
        self.model_tester = Tiny(self)
        random_ids = common.ids_tensor
        text = lambda shape, vocab_size, **kwargs: random_ids(shape, min(vocab_size, Tiny.image_token_id), **kwargs)
        patch = unittest.mock.patch.object(common, "ids_tensor", text)  # random text has no image without its pixels
        patch.start()
        self.addCleanup(patch.stop)
