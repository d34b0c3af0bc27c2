"""The recipe's network without its weights: built on PyTorch's meta device, then counted. Nothing is downloaded."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from alignvlm.config.schema import PARTS, Recipe
from alignvlm.errors import UserError
from alignvlm.model.backbones import config_from_fields, vision_config
from alignvlm.model.configuration import AlignVLMConfig
from alignvlm.model.modeling import AlignVLMForConditionalGeneration


@dataclass(frozen=True)
class Dimensions:
    """The sizes that memory and FLOPs depend on, in the letters of the paper where it has them."""

    patches: int
    """t: patch features of one tile."""
    tokens_per_tile: int
    """Visual tokens that one tile gives to the LLM."""
    tile_size: int
    """Side of a tile in pixels."""
    vision_size: int
    """Width of the vision encoder."""
    vision_inner: int
    """Width of its feed-forward layers."""
    vision_layers: int
    feature_size: int
    """d: width of a feature that enters the connector, neighbours merged."""
    connector: str
    """Kind of the connector."""
    hidden_size: int
    """D: width of the LLM."""
    inner_size: int
    """Width of its feed-forward layers."""
    num_layers: int
    attention_size: int
    """Query heads x head width."""
    key_size: int
    """Key heads x head width."""
    vocab_size: int
    """V."""


@dataclass(frozen=True)
class Network:
    """The model on the meta device and its sizes."""

    model: AlignVLMForConditionalGeneration
    dims: Dimensions

    def part(self, name: str) -> nn.Module:
        """`vision`, `connector` or `language`."""
        return getattr(self.model, name)

    @property
    def head(self) -> torch.Tensor:
        """Weight of the LM head [V, D]; the embedding itself where they are tied."""
        output: Any = self.model.get_output_embeddings()
        return output.weight

    @property
    def embedding(self) -> torch.Tensor:
        """The LLM's input embedding [V, D]."""
        inputs: Any = self.model.get_input_embeddings()
        return inputs.weight

    def learns(self, weight: torch.Tensor, trainable: Sequence[str]) -> bool:
        """Whether this parameter of the model matches one of the globs."""
        return any(p is weight and matches(name, trainable) for name, p in self.model.named_parameters())

    def parameters(self, part: str, trainable: Sequence[str] = ("*",)) -> int:
        """Elements of the part's parameters whose names match one of the globs; tied ones count once."""
        return sum(
            parameter.numel()
            for name, parameter in self.model.named_parameters()
            if name.startswith(f"{part}.") and matches(name, trainable)
        )

    def total(self, trainable: Sequence[str] = ("*",)) -> int:
        """The same over all parts."""
        return sum(self.parameters(part, trainable) for part in PARTS)


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether a parameter's name matches one of a stage's `trainable` globs."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


def build_network(recipe: Recipe) -> Network:
    """The recipe's model on the meta device; UserError when neither it nor a local folder states the shapes."""
    try:
        config = AlignVLMConfig(
            vision_config=_vision_config(recipe),
            text_config=_language_config(recipe),
            connector_config=asdict(recipe.model.connector),
            tiles_config=asdict(recipe.model.tiles),
        )
        return network_of(config)
    except ValueError as error:
        raise UserError(f"recipe {recipe.name!r}: this model cannot be built: {error}") from error


def network_of(config: AlignVLMConfig) -> Network:
    """The network that a model's config describes, on the meta device."""
    with torch.device("meta"):
        model = AlignVLMForConditionalGeneration(config)
    vision: Any = config.vision_config
    text: Any = config.text_config
    connector: Any = config.connector_config
    tiles: Any = config.tiles_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Network(
        model,
        Dimensions(
            patches=(vision.image_size // vision.patch_size) ** 2,
            tokens_per_tile=config.tiling.tokens_per_tile,
            tile_size=vision.image_size,
            vision_size=vision.hidden_size,
            vision_inner=vision.intermediate_size,
            vision_layers=vision.num_hidden_layers,
            feature_size=vision.hidden_size * tiles.get("merge", 1) ** 2,
            connector=connector["kind"],
            hidden_size=text.hidden_size,
            inner_size=text.intermediate_size,
            num_layers=text.num_hidden_layers,
            attention_size=text.num_attention_heads * head_dim,
            key_size=key_heads * head_dim,
            vocab_size=text.vocab_size,
        ),
    )


def _language_config(recipe: Recipe) -> PreTrainedConfig:
    language = recipe.model.language
    if not language.config:
        return AutoConfig.from_pretrained(_here(recipe, "language", language.path), local_files_only=True)
    vocabulary = {"vocab_size": language.tokenizer.vocab_size} if language.tokenizer else {}
    return config_from_fields({**language.config, **vocabulary}, "model.language.config")


def _vision_config(recipe: Recipe) -> PreTrainedConfig:
    vision = recipe.model.vision
    if not vision.config:
        _here(recipe, "vision", vision.path)
    return vision_config(recipe)


def _here(recipe: Recipe, part: str, path: str | None) -> str:
    """The path itself when it is a folder on this machine: an estimate downloads nothing."""
    if path is None or not Path(path).is_dir():
        raise UserError(
            f"recipe {recipe.name!r}: the shape of {path!r} is not on this machine; "
            f"state model.{part}.config (with its model_type) to estimate without it"
        )
    return path
