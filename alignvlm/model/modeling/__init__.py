"""The vision-language model in transformers' layout."""

from alignvlm.model.modeling.base import AlignVLMModel
from alignvlm.model.modeling.head import AlignVLMForConditionalGeneration, AlignVLMOutput

__all__ = ["AlignVLMForConditionalGeneration", "AlignVLMModel", "AlignVLMOutput"]
