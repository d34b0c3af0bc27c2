"""Hugging Face-native model: importing this package registers it with transformers' Auto classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from alignvlm.model.attention import register as _register_attention
from alignvlm.model.configuration import AlignVLMConfig
from alignvlm.model.inputs.image_processor import AlignVLMImageProcessor
from alignvlm.model.inputs.processing import AlignVLMProcessor
from alignvlm.model.modeling import AlignVLMForConditionalGeneration

AutoConfig.register(AlignVLMConfig.model_type, AlignVLMConfig, exist_ok=True)
AutoModelForImageTextToText.register(AlignVLMConfig, AlignVLMForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(AlignVLMConfig, AlignVLMImageProcessor, exist_ok=True)
AutoProcessor.register(AlignVLMConfig, AlignVLMProcessor, exist_ok=True)
_register_attention()

__all__ = ["AlignVLMConfig", "AlignVLMForConditionalGeneration", "AlignVLMImageProcessor", "AlignVLMProcessor"]
