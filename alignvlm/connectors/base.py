"""What every connector is: options of its kind, visual features in, LLM input embeddings out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from alignvlm.connectors.options import ConnectorOptions


@dataclass(frozen=True)
class Sizes:
    """What a connector stands between."""

    feature_size: int
    """d: width of a visual feature, merged neighbours concatenated."""
    hidden_size: int
    """D: width of the LLM."""
    vocab_size: int
    """V: rows of the LLM's input embedding."""
    side: int
    """Features per side of a tile: T is its square."""


class Connector(nn.Module):
    """Maps the features of tiles to the LLM's input space.

    A kind is a subclass of `ConnectorOptions` with its options, a subclass of this class that names it as
    `options_class`, and `@register` above it. Everything else follows: packing, sample lengths, the plan's fingerprint
    and estimates from `tokens_per_tile`, parameters and export from what the module holds, FLOPs and memory from
    running it on PyTorch's meta device.

    `forward(features, embedding)` takes features [K, T, d] of K tiles and the LLM's input embedding weight [V, D] (an
    argument and not a submodule, so that ZeRO-3 and shared gradients work), and returns [K, T', D] with
    T' = `tokens_per_tile(options, side)`. A model calls it exactly once per forward pass.
    """

    options_class: ClassVar[type[ConnectorOptions]]
    collect_statistics: bool = False
    """When set, the next forward pass leaves numbers worth tracking in `last_statistics`."""
    last_statistics: dict[str, float]
    older_exports: ClassVar[str] = ""
    """What to do with exports whose weights do not fit this class, where an earlier version wrote others."""
    kept_bytes: int = 0
    """Bytes for logits over a vocabulary that a forward pass keeps, so that the backward pass need not redo them."""

    def __init__(self, options: ConnectorOptions, sizes: Sizes) -> None:
        """Subclasses call this first; `options` is an instance of their `options_class`."""
        super().__init__()
        self.options, self.sizes = options, sizes
        self.last_statistics = {}

    @classmethod
    def tokens_per_tile(cls, options: ConnectorOptions, side: int) -> int:
        """Visual tokens T' that the LLM gets for one tile of side x side features.

        Raises ValueError, beginning with `connector.OPTION`, when the options do not fit the side.
        """
        return side**2

    def forward(self, features: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def recomputed_flops(self, num_tokens: int) -> float:
        """FLOPs of what the backward pass of so many visual tokens computes a second time on purpose."""
        return 0.0

    def workspace_bytes(self, num_tokens: int) -> float:
        """Bytes on a GPU, for so many visual tokens, that are neither saved tensors nor parameters nor gradients."""
        return 0.0

    def kept_logits_bytes(self, num_tokens: int, budget: float) -> float:
        """Bytes of the logits that so many visual tokens keep from the forward to the backward pass within a budget."""
        return 0.0

    @contextmanager
    def same_weights(self) -> Iterator[None]:
        """While this is open no weight changes, as in the micro-batches of one optimizer step.

        What follows from weights alone may be computed once.
        """
        yield

    def reset_parameters(self) -> None:
        """Initialise the parameters that belong to this module itself."""

    def reset_layer(self, layer: nn.Module) -> bool:
        """Initialise a layer inside this module, by default as PyTorch does.

        False leaves it to transformers: N(0, `initializer_range` of the LLM), biases zero.
        """
        if callable(reset := getattr(layer, "reset_parameters", None)):
            reset()
        return True

    def start_from(self, embedding: torch.Tensor, lm_head: torch.Tensor) -> None:
        """Start with what the language model lends: its input embedding and its head, both [V, D].

        Called once, before any training, after `reset_parameters`. Most connectors take nothing.
        """
