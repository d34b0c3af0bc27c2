"""Hugging Face-native model: importing this package registers it with transformers' Auto classes."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from alignvlm.model.attention import register as _register_attention
from alignvlm.model.configuration import AlignVLMConfig
from alignvlm.model.inputs.image_processor import AlignVLMImageProcessor
from alignvlm.model.inputs.processing import AlignVLMProcessor
from alignvlm.model.modeling import AlignVLMForConditionalGeneration, AlignVLMModel
from alignvlm.parts import RENAMINGS

AutoConfig.register(AlignVLMConfig.model_type, AlignVLMConfig, exist_ok=True)
AutoModel.register(AlignVLMConfig, AlignVLMModel, exist_ok=True)
AutoModelForImageTextToText.register(AlignVLMConfig, AlignVLMForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(AlignVLMConfig, AlignVLMForConditionalGeneration, exist_ok=True)
AutoImageProcessor.register(  # for both: where torchvision is installed transformers asks for one of that name
    AlignVLMConfig,
    image_processor_classes=dict.fromkeys(("pil", "torchvision"), AlignVLMImageProcessor),
    exist_ok=True,
)
AutoProcessor.register(AlignVLMConfig, AlignVLMProcessor, exist_ok=True)
register_checkpoint_conversion_mapping(
    AlignVLMConfig.model_type, [WeightRenaming(*names) for names in RENAMINGS], overwrite=True
)
_register_attention()

__all__ = [
    "AlignVLMConfig",
    "AlignVLMForConditionalGeneration",
    "AlignVLMImageProcessor",
    "AlignVLMModel",
    "AlignVLMProcessor",
]
