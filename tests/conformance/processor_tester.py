"""transformers' tester of processors on ours; `make check-hf` runs this file."""

from __future__ import annotations

import unittest
from typing import Any

from alignvlm.model import AlignVLMImageProcessor, AlignVLMProcessor
from alignvlm.model.inputs.tokenizer import train_tokenizer
from tests.conformance.testers import load
from tests.tiny import WORDS

common = load("test_processing_common")


class AlignVLMProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    """Every test that transformers has for any processor."""

    processor_class = AlignVLMProcessor

    @staticmethod
    def does_processor_return_mm_offsets(processor_class: type, method_name: str) -> bool:
        """Whether it has the method itself; transformers compares it with that of the first base class."""
        return method_name in vars(processor_class)

    @classmethod
    def _setup_image_processor(cls) -> Any:
        return AlignVLMImageProcessor(tile_size=32, tokens_per_tile=4, max_tiles=1)  # it counts one tile per image

    @classmethod
    def _setup_tokenizer(cls) -> Any:
        return train_tokenizer([*WORDS, "lower newer upper older longer string"] * 20, 320)
