"""The recipe's network without its weights, built and run on PyTorch's meta device. Nothing is downloaded.

Tensors there take no memory and products no time: both can be counted for a model of any size.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from alignvlm.config.schema import PARTS, Recipe
from alignvlm.errors import UserError
from alignvlm.model.attention import SDPA, Documents, attention_kwargs
from alignvlm.model.backbones import config_from_fields, vision_config
from alignvlm.model.configuration import AlignVLMConfig
from alignvlm.model.modeling import AlignVLMForConditionalGeneration


@dataclass(frozen=True)
class Dimensions:
    """The sizes that memory and FLOPs depend on, in the letters of the paper where it has them."""

    tile_size: int
    """Side of a tile in pixels."""
    features_per_tile: int
    """Features of one tile that enter the connector, neighbours merged."""
    feature_size: int
    """d: width of such a feature."""
    tokens_per_tile: int
    """Visual tokens that one tile gives to the LLM."""
    hidden_size: int
    """D: width of the LLM."""
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

    def set_trainable(self, trainable: Sequence[str]) -> None:
        """Let gradients reach exactly the parameters that match one of the globs."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(matches(name, trainable))

    def empty(self, *shape: int, needs_grad: bool = False) -> torch.Tensor:
        """A tensor of the model's dtype on the meta device."""
        return torch.empty(*shape, dtype=self.model.dtype, device="meta", requires_grad=needs_grad)

    def run_vision(self, num_tiles: int) -> torch.Tensor:
        """Features [K, T, d] of so many tiles."""
        return self.model.encode_tiles(self.empty(num_tiles, 3, self.dims.tile_size, self.dims.tile_size))

    def run_connector(self, num_tiles: int, needs_grad: bool) -> torch.Tensor:
        """Visual tokens [K, T', D]; `needs_grad`: the vision encoder learns too."""
        shape = (num_tiles, self.dims.features_per_tile, self.dims.feature_size)
        return self.model.connector(self.empty(*shape, needs_grad=needs_grad), self.embedding)

    def run_decoder(self, num_tokens: int, needs_grad: bool) -> torch.Tensor:
        """Last hidden states [1, T, D] of one document; `needs_grad`: something before the decoder learns."""
        device = torch.device("meta")
        documents = Documents(torch.empty(2, dtype=torch.int32, device=device), max_seqlen=1)  # passes any window
        # A mask in four dimensions is taken as it is: transformers looks at values to make one itself. SDPA per
        # document ignores it.
        mask = torch.empty(1, 1, num_tokens, num_tokens, dtype=torch.bool, device=device)
        embeds = self.empty(1, num_tokens, self.dims.hidden_size, needs_grad=needs_grad)
        decoder: Any = self.model.language.get_decoder()
        outputs = decoder(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **attention_kwargs(documents))
        return outputs.last_hidden_state

    def run_head(self, num_tokens: int, needs_grad: bool) -> torch.Tensor:
        """Logits [1, T, V] of hidden states; `needs_grad`: these depend on something that learns."""
        head: Any = self.model.get_output_embeddings()
        return head(self.empty(1, num_tokens, self.dims.hidden_size, needs_grad=needs_grad))


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether a parameter's name matches one of a stage's `trainable` globs."""
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


@dataclass(frozen=True)
class PerLayer:
    """A measurement of a part: its equal layers, and what remains without any."""

    layer: Any
    num_layers: int
    rest: Any

    @property
    def total(self) -> Any:
        return self.rest + self.num_layers * self.layer


def measure_layers(part: nn.Module, measure: Callable[[], Any]) -> PerLayer:
    """What `measure` returns (a number, or an array of them) when it runs the part, whose layers are all equal.

    The part runs with one layer and with two, for time: all layers take seconds. A part without a list of equal layers
    runs once as it is, and its layers count as equal shares.
    """
    parent, name, layers = _largest_list(part)
    if len(layers) < 2 or len({_signature(layer) for layer in layers}) > 1:
        whole, num_layers = measure(), max(1, len(layers))
        return PerLayer(whole / num_layers, num_layers, 0 * whole)
    try:
        setattr(parent, name, layers[:1])
        first = measure()
        setattr(parent, name, layers[:2])
        layer = measure() - first
    finally:
        setattr(parent, name, layers)
    return PerLayer(layer, len(layers), first - layer)


def _largest_list(part: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module list with the most parameters, with its parent and its name there: the part's layers."""
    found: list[tuple[nn.Module, str, nn.ModuleList]] = []
    for parent in part.modules():
        found += [(parent, name, child) for name, child in parent.named_children() if isinstance(child, nn.ModuleList)]
    size = lambda entry: sum(p.numel() for p in entry[2].parameters())
    return max(found, key=size, default=(part, "", nn.ModuleList()))


def _signature(module: nn.Module) -> tuple[Any, ...]:
    return type(module), *((name, p.shape, p.requires_grad) for name, p in module.named_parameters())


def build_network(recipe: Recipe) -> Network:
    """The recipe's model on the meta device; UserError when neither it nor a local folder states the shapes."""
    try:
        config = AlignVLMConfig(
            vision_config=_vision_config(recipe),
            text_config=_language_config(recipe),
            connector_config=asdict(recipe.model.connector),
            tiles_config=asdict(recipe.model.tiles),
        )
        return network_of(config, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    except ValueError as error:
        raise UserError(f"recipe {recipe.name!r}: this model cannot be built: {error}") from error


def network_of(config: AlignVLMConfig, dtype: torch.dtype = torch.bfloat16) -> Network:
    """The network that a model's config describes, on the meta device, in training mode."""
    config = copy.deepcopy(config)  # its attention is set below
    with torch.device("meta"):
        model = AlignVLMForConditionalGeneration(config).train()
    model.to(dtype=dtype)
    config.vision_config._attn_implementation, config.text_config._attn_implementation = "sdpa", SDPA
    vision: Any = config.vision_config
    merge = config.tiles_config["merge"]
    return Network(
        model,
        Dimensions(
            tile_size=vision.image_size,
            features_per_tile=(vision.image_size // vision.patch_size // merge) ** 2,
            feature_size=vision.hidden_size * merge**2,
            tokens_per_tile=config.tiling.tokens_per_tile,
            hidden_size=config.text_config.hidden_size,
            vocab_size=config.text_config.vocab_size,
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
