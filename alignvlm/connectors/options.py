"""Options of the built-in connectors, and which kinds there are. Recipes are checked with them, and without torch.

A connector of your own may keep its options in its own file: `register` makes both known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from annotated_types import Le

from alignvlm.errors import UserError
from alignvlm.plugins import import_plugins
from alignvlm.settings import Bool, Count, PositiveFloat, PositiveInt, filled, settings
from data_pipeline.errors import nearest

OWN_KIND = (
    "A kind of your own is known once its module is imported: name it in the recipe's `imports`, or in ALIGNVLM_IMPORTS"
)


class UnknownKindError(UserError, ValueError):
    """No module has registered this kind of connector: a mistyped recipe, or an export whose module is not imported."""


Width = Annotated[PositiveInt, Le(2**20)]
WindowSide = Annotated[PositiveInt, Le(1024)]


@settings
class ConnectorOptions:
    """Options of one kind of connector; a subclass adds its own and gives `kind` its name as default."""

    kind: str = ""
    """Which connector."""


@settings
class AlignOptions(ConnectorOptions):
    """Options of the ALIGN connector; the defaults are the paper's."""

    kind: Literal["align"] = "align"
    """A weighted average of the LLM's own text embeddings."""
    gain: PositiveFloat = 1.0
    """Initial gamma of the LayerNorm over the vocabulary. Which value learns soonest depends on the LM and its
    initialisation: the quickstart takes 0.5."""
    temperature: PositiveFloat = 1.0
    """The logits are divided by it before the softmax. The paper states none."""
    norm_hidden: Bool = True
    """LayerNorm over D after W1."""
    norm_vocab: Bool = True
    """LayerNorm over V before the softmax."""
    norm_output: Bool = False
    """LayerNorm over D of the averages, as in the released low-resource code: visual tokens are then as large as its
    weights say, however flat the softmax is."""
    activation: Literal["none", "relu"] = "none"
    """Activation after the LayerNorm over D; the released low-resource code has `relu`."""
    w2_start: Literal["lm_head", "random"] = "lm_head"
    """W2 before training: a copy of the LM head as in the paper, or random rows of its mean and spread (a baseline)."""
    num_active: PositiveInt | None = filled()
    """Rows of W2 in an export whose vocabulary `alignvlm analyze vocab` has restricted."""


@settings
class MLPOptions(ConnectorOptions):
    """Options of the MLP connector."""

    kind: Literal["mlp"] = "mlp"
    """Two linear layers with a GELU between them."""
    hidden_size: Width | None = None
    """Width between the two layers; null takes the LLM's width."""


@settings
class OvisOptions(ConnectorOptions):
    """Options of the Ovis connector."""

    kind: Literal["ovis"] = "ovis"
    """A weighted average of learned visual words."""
    visual_vocab_size: Annotated[PositiveInt, Le(2**24)] = 8192
    """Rows of the visual embedding table. Ovis' own: 131072 (1.0, 1.5), 65536 (2.5)."""
    norm_vocab: Bool = True
    """LayerNorm over the visual words before the softmax, as in all of Ovis' code."""
    table_start: Literal["text", "normal"] = "text"
    """The table before training: normal with the mean and spread of the text embeddings (Ovis' `vte_re_init`), or with
    mean 0 and spread 1, which Ovis' published scripts have."""
    indicators: Bool = False
    """A learned token before and one after each tile. Ovis 1.0 has them around an image, which is one tile there."""


@settings
class PerceiverOptions(ConnectorOptions):
    """Options of the Perceiver resampler; the defaults are LLaVA-NeXT's, but for the number of latents (32 there)."""

    kind: Literal["perceiver"] = "perceiver"
    """Learned queries that attend to the features of a tile."""
    hidden_size: Width | None = None
    """Width of the queries; null takes that of the features. The features are projected to another width first."""
    num_latents: Annotated[PositiveInt, Le(2**16)] = 64
    """Latent queries, and so visual tokens, per tile."""
    num_layers: Annotated[PositiveInt, Le(1024)] = 3
    """Cross-attention layers."""
    num_heads: Annotated[PositiveInt, Le(1024)] = 8
    """Attention heads."""
    head_dim: Annotated[PositiveInt, Le(4096)] = 64
    """Width of one head."""


@settings
class HReducerOptions(ConnectorOptions):
    """Options of the H-Reducer; the defaults are DocOwl 1.5's."""

    kind: Literal["h_reducer"] = "h_reducer"
    """Each window of neighbouring features becomes one visual token."""
    window: tuple[WindowSide, WindowSide] = (1, 4)
    """Rows and columns of a window; zeros fill the last windows where they do not divide a tile's side."""
    eos: Bool = True
    """A learned token after those of each tile."""


@settings
class CAbstractorOptions(ConnectorOptions):
    """Options of the C-Abstractor; the defaults are Honeybee's."""

    kind: Literal["c_abstractor"] = "c_abstractor"
    """Convolutions around a pooling to so many visual tokens."""
    num_queries: Annotated[PositiveInt, Le(2**16)] = 144
    """Visual tokens per tile, a square number."""
    hidden_size: Width = 1024
    """Channels of the convolutions."""
    depth: Annotated[Count, Le(64)] = 3
    """RegNet blocks before the pooling, and as many after it; with 0 there is the pooling alone."""
    mlp_depth: Annotated[PositiveInt, Le(64)] = 2
    """Linear layers behind, with SiLU between them."""


BUILT_IN: dict[str, type[ConnectorOptions]] = {
    options().kind: options
    for options in (
        AlignOptions,
        MLPOptions,
        OvisOptions,
        PerceiverOptions,
        HReducerOptions,
        CAbstractorOptions,
    )
}
"""Kind -> its options; the connector lies in the module of this folder that is called like its kind."""

_OPTIONS = dict(BUILT_IN)


def register_options(options: type[ConnectorOptions]) -> None:
    """Make a kind known by its options. Raises ValueError when it has no name, or its name is taken."""
    kind = options().kind
    known = _OPTIONS.get(kind, options)
    if not kind or (known.__module__, known.__qualname__) != (options.__module__, options.__qualname__):
        raise ValueError(f"{options.__qualname__}: the connector kind {kind!r} has no name or is taken")
    _OPTIONS[kind] = options


def connector_kinds() -> list[str]:
    """Names of all kinds, in the order of their registration."""
    return list(_OPTIONS)


def options_class(kind: str) -> type[ConnectorOptions]:
    """The options of a kind. Raises UnknownKindError naming the kinds that there are."""
    if kind not in _OPTIONS:
        import_plugins()  # an export names its kind, and no module: ALIGNVLM_IMPORTS does
    if kind not in _OPTIONS:
        raise UnknownKindError(f"connector kind {kind!r} is unknown: {nearest(kind, _OPTIONS)}. {OWN_KIND}")
    return _OPTIONS[kind]


def connector_options(saved: Mapping[str, Any]) -> ConnectorOptions:
    """Options from the config of an export; options of other kinds, which older exports hold too, are left out."""
    chosen = options_class(str(saved.get("kind", "align")))
    names = {field.name for field in fields(chosen)}
    return chosen(**{name: value for name, value in saved.items() if name in names})
