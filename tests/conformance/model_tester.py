"""transformers' tester of models on ours; `make check-hf` runs this file."""

from __future__ import annotations

import inspect

import torch

from alignvlm.model import AlignVLMConfig, AlignVLMForConditionalGeneration
from tests.conformance.tiny import ModelTest, common


class AlignVLMModelTest(ModelTest, common.ModelTesterMixin, common.GenerationTesterMixin):
    """Every test that transformers has for any model; two that it asks a GPU for give a result without one."""

    _torch_compile_train_cls = AlignVLMForConditionalGeneration

    def test_flex_attention_with_grads(self) -> None:
        """On a CPU, where PyTorch's flex attention has no backward pass, without gradients."""
        with torch.set_grad_enabled(torch.cuda.is_available()):
            inspect.unwrap(common.ModelTesterMixin.test_flex_attention_with_grads)(self)

    def test_torch_compile_for_training(self) -> None:
        """It reads the vocabulary's size where the config of a language model has it."""
        make = self.model_tester.get_config

        def config() -> AlignVLMConfig:
            made = make()
            made.vocab_size = made.image_token_id  # text alone
            return made

        self.model_tester.get_config = config
        inspect.unwrap(common.ModelTesterMixin.test_torch_compile_for_training)(self)


for name in dir(common.GenerationTesterMixin):
    if name.startswith("test_"):
        setattr(AlignVLMModelTest, name, None)
