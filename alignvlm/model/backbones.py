"""Configs of the two backbones: from the fields that a recipe states, or from the pretrained folder it names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from alignvlm.errors import UserError
from data_pipeline.errors import did_you_mean

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe
    from alignvlm.model.processing import AlignVLMProcessor


def vision_config(recipe: Recipe) -> PreTrainedConfig:
    """Config of the vision encoder; of a pretrained SigLIP or CLIP only the vision half, without its pooling head."""
    vision = recipe.model.vision
    if vision.config:
        config = config_from_fields(vision.config, "model.vision.config")
    elif vision.path is not None:
        config = AutoConfig.from_pretrained(vision.path)
        config = getattr(config, "vision_config", config)
    else:
        raise UserError("model.vision: give a path (pretrained weights) or a config (from scratch)")
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    return config


def language_config(recipe: Recipe, processor: AlignVLMProcessor) -> PreTrainedConfig:
    """Config of a language model from scratch, its vocabulary that of the tokenizer."""
    tokenizer = processor.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    fields = {**ids, **recipe.model.language.config, "vocab_size": len(tokenizer)}
    return config_from_fields(fields, "model.language.config")


def config_from_fields(fields: Mapping[str, Any], key: str) -> PreTrainedConfig:
    """A backbone's config from the fields under `key` of a recipe. Raises UserError when they do not make one."""
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if model_type is None:
        raise UserError(f"{key}: model_type is missing (siglip_vision_model, llama, qwen2, …)")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(str(model_type), CONFIG_MAPPING)
        raise UserError(f"{key}: model_type {model_type!r} is unknown to transformers{hint and f'; {hint}'}")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise UserError(f"{key}: {error}") from error
