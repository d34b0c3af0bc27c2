"""From a recipe to its processor and its initial model: pretrained or new backbones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from alignvlm.config.schema import Recipe
from alignvlm.errors import UserError
from alignvlm.model.backbones import language_config, vision_config
from alignvlm.model.configuration import AlignVLMConfig
from alignvlm.model.modeling import AlignVLMForConditionalGeneration
from alignvlm.model.processing import AlignVLMProcessor
from alignvlm.model.tiling import TilingSpec
from alignvlm.model.tokenizer import END


def load_processor(recipe: Recipe) -> AlignVLMProcessor:
    """The recipe's processor, with the tokenizer that it names or that was trained for it.

    Raises:
        UserError: neither is there, or a tile cannot be divided as the recipe says.
    """
    spec = tiling_of(recipe)
    language = recipe.model.language
    if language.tokenizer is not None:
        folder = tokenizer_folder(recipe)
        if not folder.is_dir():
            raise UserError(f"{folder}: no tokenizer was trained yet; `alignvlm data plan RECIPE` does it")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    elif language.path is not None:
        tokenizer = AutoTokenizer.from_pretrained(language.path)
    else:
        raise UserError("model.language: give a path (pretrained weights and tokenizer) or a tokenizer to train")
    template = language.chat_template
    if template is not None and template.endswith(".jinja"):
        template = Path(template).read_text()
    return AlignVLMProcessor(tokenizer, tiling=asdict(spec), chat_template=template)


def tiling_of(recipe: Recipe) -> TilingSpec:
    """How the recipe's model cuts images. Raises UserError where a tile cannot be divided as its settings say."""
    config = AlignVLMConfig(
        vision_config=vision_config(recipe), connector_config=asdict(recipe.model.connector),
        tiles_config=asdict(recipe.model.tiles),
    )  # fmt: skip
    try:
        return config.tiling
    except ValueError as error:
        raise UserError(f"recipe {recipe.name!r}: {error}") from error


def tokenizer_folder(recipe: Recipe) -> Path:
    """Where a tokenizer trained for the recipe's data is kept."""
    return Path(recipe.data.root) / "tokenizer"


def build_model(recipe: Recipe, processor: AlignVLMProcessor) -> AlignVLMForConditionalGeneration:
    """The model before any training, on the CPU: pretrained backbones where the recipe names them, new ones elsewhere.

    The connector's share of the LM head (ALIGN's W2) is copied from it.
    """
    torch.manual_seed(recipe.seed)
    vision, language = recipe.model.vision, recipe.model.language
    tower_config = vision_config(recipe)
    if vision.path is not None:
        tower = AutoModel.from_pretrained(vision.path, config=tower_config)
    else:
        tower = AutoModel.from_config(tower_config)
        if vision.position_std is not None:
            _spread_positions(tower, vision.position_std)
    if language.path is not None:
        lm = AutoModelForCausalLM.from_pretrained(language.path)
    else:
        lm = AutoModelForCausalLM.from_config(language_config(recipe, processor))
    config = AlignVLMConfig(
        vision_config=tower.config,
        text_config=lm.config,
        connector_config=asdict(recipe.model.connector),
        tiles_config=asdict(recipe.model.tiles),
        image_token_id=processor.image_token_id,
        image_mean=vision.image_mean,
        image_std=vision.image_std,
        tie_word_embeddings=bool(lm.config.tie_word_embeddings),
    )
    model = AlignVLMForConditionalGeneration(config, tower, lm)
    model.connector.copy_lm_head(lm.get_output_embeddings().weight)
    tokenizer = processor.tokenizer
    end = tokenizer.convert_tokens_to_ids(END) if END in tokenizer.get_vocab() else tokenizer.eos_token_id
    model.generation_config.eos_token_id = end
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _spread_positions(tower: torch.nn.Module, std: float) -> None:
    """Draw the position embeddings of a new encoder with this standard deviation."""
    weights = [p for name, p in tower.named_parameters() if name.endswith("position_embedding.weight")]
    if not weights:
        raise UserError("model.vision.position_std: this encoder has no `position_embedding.weight` to draw")
    for weight in weights:
        torch.nn.init.normal_(weight, std=std)
