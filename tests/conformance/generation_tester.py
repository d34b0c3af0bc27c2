"""transformers' tester of `generate` on ours; `make check-hf` runs this file where it has that tester."""

from __future__ import annotations

from typing import Any

from tests.conformance.tiny import ModelTest, common


class AlignVLMGenerationTest(ModelTest, common.ModelTesterMixin, common.GenerationTesterMixin):
    """Every test that transformers has for `generate`; it uses what the tester of models has beside its tests."""

    def prepare_config_and_inputs_for_generate(self, batch_size: int = 2) -> tuple[Any, dict[str, Any]]:
        """As of transformers, which would skip tests of caches for models whose own config says nothing of one."""
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        config.use_cache = True
        return config, inputs

    def attention_mask_padding_matches_padding_free_with_position_ids(self, *args: Any, **kwargs: Any) -> None:
        """It takes pixels away and wants padding: text alone."""
        self.model_tester.has_images = False
        super().attention_mask_padding_matches_padding_free_with_position_ids(*args, **kwargs)


for name in dir(common.ModelTesterMixin):
    if name.startswith("test_") and not hasattr(common.GenerationTesterMixin, name):
        setattr(AlignVLMGenerationTest, name, None)
