"""The two backbones: configs from the fields that a recipe states or the pretrained folder it names; small changes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoConfig, PreTrainedConfig
from transformers.modeling_rope_utils import RopeParameters

from alignvlm.config.places import recipe_error
from alignvlm.errors import UserError, shown
from data_pipeline.errors import did_you_mean
from data_pipeline.files import reason

if TYPE_CHECKING:
    from alignvlm.config.schema import Recipe
    from alignvlm.model.inputs.processing import AlignVLMProcessor

T = TypeVar("T")
Backbone = Literal["vision", "language"]

READ_BY_MODELS = {"head_dim", "sliding_window"}
"""Fields that transformers' models read although not every config class declares them."""
FINAL_NORMS = ("post_layernorm", "layernorm", "norm")
"""What vision encoders of transformers call the norm behind their layers (SigLIP and CLIP; ViT and DINOv2; DINOv3)."""
NAMES_OF_LAYERS = {"stage_names", "out_features", "out_indices"}
"""Fields of some encoders' configs (DINOv2) that follow from the number of layers."""
MAX_TILE = 8192
"""Pixels of a tile's side."""
MAX_MODULES = 4096
"""Layers, heads or experts of a backbone: each is built, and the largest models have some hundreds."""
_COUNT = re.compile(r"num_\w+|n_(layer|head|expert)\w*|\w+_(layers|depth)")


def vision_config(recipe: Recipe) -> PreTrainedConfig:
    """Config of the vision encoder; of a pretrained SigLIP or CLIP only the vision half, without its pooling head."""
    vision = recipe.model.vision
    if vision.config:
        config = config_from_fields(recipe, "vision", vision.config)
    else:
        config = pretrained(recipe, "vision", AutoConfig.from_pretrained)
        config = getattr(config, "vision_config", config)
        check_role(recipe, "vision", config)
    _check_vision(recipe, config)
    config = _without_last_layers(recipe, config)
    if hasattr(config, "vision_use_head"):
        config.vision_use_head = False
    return config


def language_config(recipe: Recipe, processor: AlignVLMProcessor) -> PreTrainedConfig:
    """Config of a language model from scratch, its vocabulary that of the tokenizer."""
    tokenizer = processor.tokenizer
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    fields = {**ids, **recipe.model.language.config, "vocab_size": len(tokenizer)}
    return config_from_fields(recipe, "language", fields)


def config_from_fields(recipe: Recipe, part: Backbone, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """A backbone's config from the fields that its recipe states, and others that the program fills in.

    Raises:
        UserError: transformers knows no such model, or its config has no such field or refuses the value.
    """
    key = f"model.{part}.config"
    fields = dict(fields)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str):
        raise recipe_error(recipe, key, f"{key}: model_type is missing (siglip_vision_model, llama, qwen2, …)")
    if model_type not in CONFIG_MAPPING:
        hint = did_you_mean(model_type, CONFIG_MAPPING)
        message = f"{key}: model_type {shown(model_type)} is unknown to transformers{hint and f'; {hint}'}"
        raise recipe_error(recipe, f"{key}.model_type", message)
    _check_heads(recipe, key, model_type, fields)
    for name, value in fields.items():
        least = 1 if name in ("num_hidden_layers", "num_layers", "n_layer") else 0
        if _COUNT.fullmatch(name) and isinstance(value, int) and not least <= value <= MAX_MODULES:
            message = f"{key}.{name} is {shown(value)}, but must be at least {least} and at most {MAX_MODULES:,}"
            raise recipe_error(recipe, f"{key}.{name}", message)
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # each model type checks its fields in its own way: whatever it raises is about them
        name = (re.search(r"field '(\w+)'", str(error)) or ["", ""])[1]
        raise recipe_error(recipe, f"{key}.{name}".rstrip("."), f"{key}: {reason(error.__cause__ or error)}") from error
    check_role(recipe, part, config)
    stated: Mapping[str, Any] = getattr(recipe.model, part).config
    if unknown := next((name for name in stated if _is_unknown(config, name)), None):
        known = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
        hint = did_you_mean(unknown, known) or f"see {type(config).__name__} in the documentation of transformers"
        message = f"{key} has the unknown field {unknown!r} of {model_type}: {hint}"
        raise recipe_error(recipe, f"{key}.{unknown}", message)
    _check_rope(recipe, f"{key}.rope_parameters", stated.get("rope_parameters"))
    return config


def _check_rope(recipe: Recipe, key: str, stated: Any) -> None:
    """Transformers only warns of names in this mapping that it does not know; what is nearly a known one is refused."""
    for name, value in stated.items() if isinstance(stated, dict) else ():
        near = get_close_matches(name, RopeParameters.__annotations__, n=1, cutoff=0.8)
        if near and name not in RopeParameters.__annotations__:
            message = f"{key} has the unknown field {name!r}: did you mean {near[0]!r}?"
            raise recipe_error(recipe, f"{key}.{name}", message)
        _check_rope(recipe, f"{key}.{name}", value)  # one mapping per type of layer


def _check_heads(recipe: Recipe, key: str, model_type: str, fields: Mapping[str, Any]) -> None:
    """Heads share the width evenly, unless their own is stated, and so do heads their keys and values."""
    own = fields.get("head_dim", getattr(CONFIG_MAPPING[model_type], "head_dim", None)) is not None
    for name, whole in (("num_attention_heads", "hidden_size"), ("num_key_value_heads", "num_attention_heads")):
        number, of = fields.get(name), fields.get(whole)
        if not isinstance(number, int) or not isinstance(of, int) or (own and whole == "hidden_size"):
            continue
        if number < 1 or of % number:
            raise recipe_error(recipe, f"{key}.{name}", f"{key}.{name} is {number}, but must divide {whole}, {of}")


def _is_unknown(config: PreTrainedConfig, name: str) -> bool:
    """Whether a stated field stayed as it is, as an attribute that the class neither declares nor renames."""
    declared = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    return name in vars(config) and name not in declared | READ_BY_MODELS


def check_role(recipe: Recipe, part: Backbone, config: PreTrainedConfig) -> None:
    """Raise UserError when a model of this type cannot be this part."""
    if part == "language":
        fits = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) is not None
        fits = fits and getattr(config, "is_decoder", True)  # encoders such as BERT attend to what follows
        wanted = "a causal language model (llama, qwen2, …)"
    else:
        fits = getattr(MODEL_MAPPING.get(type(config), None), "main_input_name", None) == "pixel_values"
        wanted = "a vision encoder (siglip_vision_model, clip_vision_model, …)"
    if not fits:
        half = getattr(config, f"{'text' if part == 'language' else 'vision'}_config", None)
        hint = f"; its own part is {half.model_type!r}" if isinstance(half, PreTrainedConfig) else ""
        where = "config.model_type" if getattr(recipe.model, part).config else "path"
        message = f"model.{part}.{where}: {config.model_type!r} is not {wanted}{hint}"
        raise recipe_error(recipe, f"model.{part}.{where}", message)


def _check_vision(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Tiles are square, and so are patches; images have three channels."""
    key = "model.vision.config"
    size, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
    if type(size) is not int or type(patch) is not int or not 0 < patch <= size <= MAX_TILE:
        message = f"{key}: image_size {shown(size)} and patch_size {shown(patch)} must be the side of a tile and of a "
        raise recipe_error(
            recipe, f"{key}.image_size", f"{message}smaller patch in pixels, each one whole number up to {MAX_TILE:,}"
        )
    if (channels := getattr(config, "num_channels", 3)) != 3:
        raise recipe_error(recipe, f"{key}.num_channels", f"{key}.num_channels is {channels}, but images have 3")


def _without_last_layers(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of an encoder that ends with the layer that the features leave."""
    key, layer = "model.vision.feature_layer", recipe.model.vision.feature_layer
    number = getattr(config, "num_hidden_layers", 1)
    if -layer > number:
        raise recipe_error(recipe, key, f"{key} is {layer}, but the encoder has {number} layers: give -{number} to -1")
    if layer == -1:
        return config
    fields = {name: value for name, value in config.to_dict().items() if name not in NAMES_OF_LAYERS}
    return AutoConfig.for_model(**fields | {"num_hidden_layers": number + 1 + layer})


def is_hub_id(path: str) -> bool:
    """Whether `path` names weights on the hub: no folder of this machine, and written like an id."""
    return not os.path.isdir(path) and re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) is not None


def pretrained(recipe: Recipe, part: Backbone, load: Callable[..., T], **options: Any) -> T:
    """What `load` (a `from_pretrained`) makes of a part's `path`; UserError when it cannot be read.

    Formats of weights, configs and tokenizers are many, and transformers raises as many exceptions.
    """
    path = getattr(recipe.model, part).path
    try:
        return load(path, **options)
    except Exception as error:
        key = f"model.{part}.path"
        message = f"{key} is {shown(path)}, which transformers cannot load: {reason(error)}"
        raise recipe_error(recipe, key, message) from error


def model_error(recipe: Recipe, error: Exception) -> UserError:
    """The error that a model cannot be built; ours begin with the setting that is wrong, without its `model.`."""
    name = str(error).partition(" ")[0]
    if name.startswith(("tiles.", "connector.", "vision.")):
        return recipe_error(recipe, f"model.{name}", f"recipe {recipe.name!r}: model.{reason(error)}")
    key = "model"
    for part in ("vision", "language"):
        for field, value in getattr(recipe.model, part).config.items():
            if isinstance(value, str) and repr(value) in str(error):  # such as the name of an activation
                key = f"model.{part}.config.{field}"
    return recipe_error(recipe, key, f"recipe {recipe.name!r}: {key} cannot be built: {reason(error)}")


def keep_channels_last(vision: Any) -> None:
    """Let an encoder's patch embeddings [K, d, h, w] have each one's d numbers side by side in memory.

    Encoders make [K, h w, d] of them without copying. Otherwise this layout, where these numbers lie far apart, would
    stay that of every residual sum, and each LayerNorm would copy its input.
    """
    patches = vision.get_input_embeddings()
    if isinstance(patches, nn.Conv2d):
        patches.register_forward_hook(_channels_last)


def _channels_last(module: nn.Module, inputs: object, patches: torch.Tensor) -> torch.Tensor:
    return patches.contiguous(memory_format=torch.channels_last)


def remove_final_norm(vision: nn.Module) -> None:
    """Let features leave a vision encoder as its last layer makes them. Raises ValueError where there is no norm."""
    found = [name for name in FINAL_NORMS if isinstance(getattr(vision, name, None), nn.Module)]
    if not found:
        raise ValueError(
            f"vision.feature_layer can only be -1: {type(vision).__name__} has no {', '.join(FINAL_NORMS)} to remove"
        )
    for name in found:
        setattr(vision, name, nn.Identity())
