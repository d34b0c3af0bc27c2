"""From a recipe to its processor and its initial model: pretrained or new backbones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

from alignvlm.config.places import recipe_error
from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError, shown
from alignvlm.model.backbones import language_config, model_error, pretrained, vision_config
from alignvlm.model.configuration import AlignVLMConfig
from alignvlm.model.inputs.image_processor import AlignVLMImageProcessor
from alignvlm.model.inputs.processing import AlignVLMProcessor
from alignvlm.model.inputs.tiling import TilingSpec
from alignvlm.model.inputs.tokenizer import END
from alignvlm.model.modeling import AlignVLMForConditionalGeneration
from data_pipeline.files import read_needed, reason
from data_pipeline.stores.folders import local_folder

NEW_TOKENS = 256
"""How long an answer of `generate` may be that is asked for no other length; transformers' own is 20."""


def load_processor(recipe: Recipe) -> AlignVLMProcessor:
    """The recipe's processor, with the tokenizer that it names or that was trained for it.

    Raises:
        UserError: neither is there, or a tile cannot be divided as the recipe says. DataError: the trained tokenizer is
            damaged.
    """
    spec = tiling_of(recipe)
    language = recipe.model.language
    if language.tokenizer is not None:
        folder = tokenizer_folder(recipe)
        if not folder.is_dir():
            raise UserError(f"{folder}: no tokenizer was trained yet; `alignvlm data plan RECIPE` does it")
        tokenizer = read_needed(folder, AutoTokenizer.from_pretrained, "`alignvlm data plan RECIPE` trains it anew")
    else:
        tokenizer = pretrained(recipe, "language", AutoTokenizer.from_pretrained)
    return AlignVLMProcessor(AlignVLMImageProcessor(**asdict(spec)), tokenizer, chat_template=chat_template(recipe))


def chat_template(recipe: Recipe) -> str | None:
    """The recipe's own chat template, read and compiled as transformers does. Raises UserError where it cannot be."""
    key, template = "model.language.chat_template", recipe.model.language.chat_template
    if template is None:
        return None
    try:
        if template.endswith(".jinja"):
            template = Path(template).read_text(encoding="utf-8")
        _compile_jinja_template(template)
    except (OSError, UnicodeDecodeError) as error:
        raise recipe_error(recipe, key, f"{key} is {shown(template)}, which cannot be read: {reason(error)}") from error
    except (TemplateError, RecursionError) as error:
        raise recipe_error(recipe, key, f"{key} is not a Jinja template: {reason(error)}") from error
    return template


def tiling_of(recipe: Recipe) -> TilingSpec:
    """How the recipe's model cuts images. Raises UserError where a tile cannot be divided as its settings say."""
    config = AlignVLMConfig(
        vision_config=vision_config(recipe), connector_config=asdict(recipe.model.connector),
        tiles_config=asdict(recipe.model.tiles),
    )  # fmt: skip
    try:
        return config.tiling
    except ValueError as error:
        raise model_error(recipe, error) from error


def tokenizer_folder(recipe: Recipe) -> Path:
    """Where a tokenizer trained for the recipe's data is kept."""
    return local_folder(recipe.data.root) / "tokenizer"


def build_model(recipe: Recipe, processor: AlignVLMProcessor) -> AlignVLMForConditionalGeneration:
    """The model before any training, on the CPU: pretrained backbones where the recipe names them, new ones elsewhere.

    The connector has what it starts with from the language model (ALIGN's W2 from the LM head). All weights are in the
    dtype of `train.precision`, whatever the backbones are kept in.
    """
    torch.manual_seed(recipe.seed)
    vision, language = recipe.model.vision, recipe.model.language
    tower_config = vision_config(recipe)
    if vision.path is not None:
        tower = pretrained(recipe, "vision", AutoModel.from_pretrained, config=tower_config)
    else:
        tower = AutoModel.from_config(tower_config)
        if vision.position_std is not None:
            _spread_positions(recipe, tower)
    if language.path is not None:
        lm = pretrained(recipe, "language", AutoModelForCausalLM.from_pretrained)
    else:
        lm = AutoModelForCausalLM.from_config(language_config(recipe, processor))
    config = AlignVLMConfig(
        vision_config=tower.config,
        final_norm=vision.final_norm,
        text_config=lm.config,
        connector_config=asdict(recipe.model.connector),
        tiles_config=asdict(recipe.model.tiles),
        image_token_id=processor.image_token_id,
        image_mean=list(vision.image_mean),
        image_std=list(vision.image_std),
    )
    model = AlignVLMForConditionalGeneration(config, tower, lm)
    embedding: Any = lm.get_input_embeddings()
    model.model.connector.start_from(embedding.weight, lm.get_output_embeddings().weight)
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    for weight in model.parameters():  # not `model.to`, which would round RoPE's frequencies too
        weight.data = weight.data.to(dtype)
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids(END) if END in tokenizer.get_vocab() else tokenizer.eos_token_id
    model.generation_config.max_new_tokens = NEW_TOKENS
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def position_weights(recipe: Recipe, tower: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The encoder's position embeddings. Raises UserError when the recipe wants to draw them and there are none."""
    weights = [p for name, p in tower.named_parameters() if name.endswith("position_embedding.weight")]
    if not weights:
        key = "model.vision.position_std"
        raise recipe_error(recipe, key, f"{key}: this encoder has no `position_embedding.weight` to draw; remove it")
    return weights


def _spread_positions(recipe: Recipe, tower: torch.nn.Module) -> None:
    """Draw the position embeddings of a new encoder with the recipe's standard deviation."""
    std = recipe.model.vision.position_std
    assert std is not None
    for weight in position_weights(recipe, tower):
        torch.nn.init.normal_(weight, std=std)
