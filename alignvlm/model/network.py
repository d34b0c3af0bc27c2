"""The recipe's network without its weights, built and run on PyTorch's meta device. Nothing is downloaded.

Tensors there take no memory and products no time: both can be counted for a model of any size.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from alignvlm.config.schema import PARTS, Recipe, StageConfig
from alignvlm.connectors import Connector
from alignvlm.errors import UserError, shown
from alignvlm.model.attention import SDPA, Documents
from alignvlm.model.backbones import (
    Backbone,
    check_role,
    config_from_fields,
    is_hub_id,
    model_error,
    pretrained,
    vision_config,
)
from alignvlm.model.configuration import AlignVLMConfig
from alignvlm.model.lora import add_adapters
from alignvlm.model.modeling import AlignVLMForConditionalGeneration
from alignvlm.parts import public_name


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
    _adapted: dict[str, Network] = field(default_factory=dict, compare=False, repr=False)

    def of_stage(self, stage: StageConfig) -> Network:
        """The network that the stage trains: with its adapters, or this one where it has none.

        Raises:
            UserError: adapters cannot be what the stage says.
        """
        if stage.lora is None:
            return self
        key = repr((stage.name, stage.lora, stage.trainable))
        if key not in self._adapted:
            model: Any = copy.deepcopy(self.model)
            with torch.device("meta"):
                add_adapters(model, stage)
            model.to(dtype=self.model.dtype)  # as DeepSpeed does; PEFT makes adapters in fp32
            self._adapted[key] = Network(model, self.dims)
        return self._adapted[key]

    def uncalled(self, layers: Sequence[str]) -> list[str]:
        """Those of these layers of the encoder and the decoder that are not called when a document is computed."""
        left = set(layers)
        hooks = [
            self.model.get_submodule(name).register_forward_hook(lambda *_, name=name: left.discard(name))
            for name in layers
        ]
        try:
            self.run_vision(1)
            self.run_decoder(1, needs_grad=False)
        finally:
            for hook in hooks:
                hook.remove()
        return [name for name in layers if name in left]

    def part(self, name: str) -> nn.Module:
        """`vision`, `connector` or `language`: the encoder, the connector, the decoder without its head."""
        return self.model.model.part(name)

    @property
    def connector(self) -> Connector:
        return self.model.model.connector

    @property
    def head(self) -> torch.Tensor:
        """Weight of the LM head [V, D]; the embedding itself where they are tied."""
        return self.model.lm_head.weight

    @property
    def embedding(self) -> torch.Tensor:
        """The LLM's input embedding [V, D]."""
        inputs: Any = self.model.get_input_embeddings()
        return inputs.weight

    def learns(self, weight: torch.Tensor, trainable: Sequence[str]) -> bool:
        """Whether this parameter of the model matches one of the globs."""
        return any(p is weight and matches(name, trainable) for name, p in self._named_parameters)

    def learns_before_decoder(self, trainable: Sequence[str]) -> bool:
        """Whether a gradient passes the decoder's input: to the encoder, the connector or the input embedding."""
        is_trained = any(self.parameters(part, trainable) > 0 for part in ("vision", "connector"))
        return is_trained or self.learns(self.embedding, trainable)

    def parameters(self, part: str, trainable: Sequence[str] = ("*",)) -> int:
        """Elements of the part's parameters whose names match one of the globs; tied ones count once."""
        return sum(
            parameter.numel()
            for name, parameter in self._named_parameters
            if name.startswith(f"{part}.") and matches(name, trainable)
        )

    def learning(self, module: nn.Module, trainable: Sequence[str]) -> int:
        """Elements of the parameters of a module of the model whose names match one of the globs."""
        mine = {id(parameter) for parameter in module.parameters()}
        return sum(p.numel() for name, p in self._named_parameters if id(p) in mine and matches(name, trainable))

    @cached_property
    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters by public name, tied ones once. Kept: an estimate of 8B asks for them some hundred times."""
        return [(public_name(name), parameter) for name, parameter in self.model.named_parameters()]

    def total(self, trainable: Sequence[str] = ("*",)) -> int:
        """The same over all parts."""
        return sum(self.parameters(part, trainable) for part in PARTS)

    def set_trainable(self, trainable: Sequence[str]) -> None:
        """Let gradients reach exactly the parameters that match one of the globs."""
        for name, parameter in self._named_parameters:
            parameter.requires_grad_(matches(name, trainable))

    def empty(self, *shape: int, needs_grad: bool = False) -> torch.Tensor:
        """A tensor of the model's dtype on the meta device."""
        return torch.empty(*shape, dtype=self.model.dtype, device="meta", requires_grad=needs_grad)

    def run_vision(self, num_tiles: int) -> torch.Tensor:
        """Features [K, T, d] of so many tiles."""
        return self.model.model.encode_tiles(self.empty(num_tiles, 3, self.dims.tile_size, self.dims.tile_size))

    def run_connector(self, num_tiles: int, needs_grad: bool) -> torch.Tensor:
        """Visual tokens [K, T', D]; `needs_grad`: the vision encoder learns too."""
        shape = (num_tiles, self.dims.features_per_tile, self.dims.feature_size)
        return self.connector(self.empty(*shape, needs_grad=needs_grad), self.model.model.connector_embedding)

    def run_decoder(self, num_tokens: int, needs_grad: bool) -> torch.Tensor:
        """Last hidden states [1, T, D] of one document; `needs_grad`: something before the decoder learns."""
        documents = Documents(torch.empty(2, dtype=torch.int32, device="meta"), max_seqlen=1)  # passes any window
        embeds = self.empty(1, num_tokens, self.dims.hidden_size, needs_grad=needs_grad)
        outputs = self.model.model.language_model(inputs_embeds=embeds, use_cache=False, documents=documents)
        return outputs.last_hidden_state

    def try_out(self) -> None:
        """One tile through the encoder's first layer and the connector: sizes that do not fit each other raise here.

        Sizes of the language model fit when it can be built at all.
        """
        dims = self.dims
        with _first_layers(self.part("vision"), 1):
            features, expected = self.run_vision(1), (1, dims.features_per_tile, dims.feature_size)
        if features.shape != expected:
            raise ValueError(f"the vision encoder makes {tuple(features.shape)} features of a tile, not {expected}")
        visual, expected = self.run_connector(1, needs_grad=False), (1, dims.tokens_per_tile, dims.hidden_size)
        if visual.shape != expected:
            raise ValueError(f"the connector makes {tuple(visual.shape)} visual tokens of a tile, not {expected}")

    def run_head(self, num_tokens: int, needs_grad: bool) -> torch.Tensor:
        """Logits [1, T, V] of hidden states; `needs_grad`: the hidden states depend on something that learns."""
        return self.model.lm_head(self.empty(1, num_tokens, self.dims.hidden_size, needs_grad=needs_grad))


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

    def num_recomputed(self, every: int) -> int:
        """How many layers recompute their activations when one in `every` does, the first included; 0 is none."""
        return -(-self.num_layers // every) if every else 0


def measure_layers(part: nn.Module, measure: Callable[[], Any]) -> PerLayer:
    """What `measure` returns (a number, or an array of them) when it runs the part, whose layers are all equal.

    The part runs with one layer and with two, for time: all layers take seconds. A part without a list of equal layers
    runs once as it is, and its layers count as equal shares.
    """
    layers = largest_list(part)[2]
    if len(layers) < 2 or len({_signature(layer) for layer in layers}) > 1:
        whole, num_layers = measure(), max(1, len(layers))
        return PerLayer(whole / num_layers, num_layers, 0 * whole)
    with _first_layers(part, 1):
        first = measure()
    with _first_layers(part, 2):
        layer = measure() - first
    return PerLayer(layer, len(layers), first - layer)


@contextlib.contextmanager
def _first_layers(part: nn.Module, count: int) -> Iterator[None]:
    """The part with its first layers only, where it has a list of layers."""
    parent, name, layers = largest_list(part)
    try:
        if len(layers) > count:
            setattr(parent, name, layers[:count])
        yield
    finally:
        if len(layers) > count:
            setattr(parent, name, layers)


def largest_list(part: nn.Module) -> tuple[nn.Module, str, nn.ModuleList]:
    """The module list with the most parameters, with its parent and its name there: the part's layers."""
    found: list[tuple[nn.Module, str, nn.ModuleList]] = []
    for parent in part.modules():
        found += [(parent, name, child) for name, child in parent.named_children() if isinstance(child, nn.ModuleList)]
    size = lambda entry: sum(p.numel() for p in entry[2].parameters())
    return max(found, key=size, default=(part, "", nn.ModuleList()))


def _signature(module: nn.Module) -> tuple[Any, ...]:
    return type(module), *((name, p.shape, p.requires_grad) for name, p in module.named_parameters())


class ElsewhereError(UserError):
    """The shape of a backbone is neither stated nor on this machine."""


def build_network(recipe: Recipe, *, download: bool = False) -> Network:
    """The recipe's model on the meta device.

    Args:
        download: ask the hub for the configs of pretrained backbones that the recipe names; else they must be stated,
            or lie on this machine.

    Raises:
        ElsewhereError: a config is not here. UserError: the model cannot be built as the recipe says.
    """
    vision, language = backbone_config(recipe, "vision", download), backbone_config(recipe, "language", download)
    try:
        config = AlignVLMConfig(
            vision_config=vision,
            final_norm=recipe.model.vision.final_norm,
            text_config=language,
            connector_config=asdict(recipe.model.connector),
            tiles_config=asdict(recipe.model.tiles),
        )
        return network_of(config, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    except Exception as error:  # constructors of any model type: whatever they raise is about their fields
        raise model_error(recipe, error) from error


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
            features_per_tile=config.features_per_side**2,
            feature_size=vision.hidden_size * merge**2,
            tokens_per_tile=config.tiling.tokens_per_tile,
            hidden_size=config.text_config.hidden_size,
            vocab_size=config.text_config.vocab_size,
        ),
    )


def backbone_config(recipe: Recipe, part: Backbone, download: bool = False) -> PreTrainedConfig:
    """The config of one backbone; see `build_network`."""
    section: Any = getattr(recipe.model, part)
    if not section.config and not download and is_hub_id(section.path):
        try:
            AutoConfig.from_pretrained(section.path, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ElsewhereError(
                f"recipe {recipe.name!r}: the shape of {shown(section.path)} is not on this machine; "
                f"state model.{part}.config (with its model_type)"
            ) from error
    if part == "vision":
        return vision_config(recipe)
    if section.config:
        vocabulary = {"vocab_size": section.tokenizer.vocab_size} if section.tokenizer else {}
        return config_from_fields(recipe, part, {**section.config, **vocabulary})
    config = pretrained(recipe, part, AutoConfig.from_pretrained)
    check_role(recipe, part, config)
    return config
