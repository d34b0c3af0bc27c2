"""Activation memory: bytes that autograd saves for the backward pass while a part runs on the meta device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from alignvlm.config.schema import RecomputeConfig
from alignvlm.model.network import Network, PerLayer, measure_layers


@dataclass(frozen=True)
class Held:
    """Bytes of a part's activations."""

    kept: float
    """Kept from its forward to its backward pass."""
    at_work: float
    """The most that lives at once while its backward pass runs, or its forward where that keeps nothing."""


@dataclass(frozen=True)
class Activations:
    """Activations of the parts of a network. A frozen weight needs no input for the backward pass."""

    network: Network
    recompute: RecomputeConfig
    """Layers that are recomputed in the backward pass."""
    trained: tuple[str, ...] = ("*",)
    """Globs of the parameters that learn."""

    def vision(self, num_tiles: int) -> Held:
        """Activations of the vision encoder; a frozen one keeps nothing, and at work counts as a layer that learns."""
        if self.network.parameters("vision", self.trained) == 0:
            return Held(0.0, _saved(self.network, "vision", num_tiles, ("*",)).layer)
        dims = self.network.dims
        inputs = num_tiles * dims.features_per_tile * dims.feature_size
        return self._held(_saved(self.network, "vision", num_tiles, self.trained), inputs, self.recompute.vision)

    def connector(self, num_tiles: int) -> Held:
        """Activations of the connector; its backward pass also needs the workspace that its class states."""
        num_tokens = num_tiles * self.network.dims.tokens_per_tile
        kept = _saved(self.network, "connector", num_tiles, self.trained).total
        return Held(kept, kept + self.network.connector.workspace_bytes(num_tokens))

    def language(self, num_tokens: int) -> Held:
        """Activations of the decoder, without those of the loss."""
        saved = _saved(self.network, "language", num_tokens, self.trained)
        return self._held(saved, num_tokens * self.network.dims.hidden_size, self.recompute.language)

    def _held(self, saved: PerLayer, input_size: int, every: int) -> Held:
        """When one layer in `every` keeps only its input, of `input_size` elements.

        The backward pass begins with all other layers, or has the last of those that are recomputed whole, with what
        lies before it.
        """
        recomputed = saved.num_recomputed(every)
        others, before_last = saved.num_layers - recomputed, (recomputed - 1) * (every - 1)
        rest = saved.rest + recomputed * input_size * self.network.model.dtype.itemsize
        most = max(others, before_last + 1 if recomputed else 0)
        return Held(rest + others * saved.layer, rest + most * saved.layer)


@functools.lru_cache(maxsize=64)
def _saved(network: Network, part: str, size: int, trained: tuple[str, ...]) -> PerLayer:
    """Bytes that a part saves for so many tiles (the language model: tokens)."""
    network.set_trainable(trained)
    if part == "connector":  # runs whole: its layers are few, and need not be a stack
        learns = network.parameters("vision", trained) > 0
        return PerLayer(saved_bytes(network.model, lambda: network.run_connector(size, learns)), 1, 0.0)
    before = network.learns_before_decoder(trained)
    run = (lambda: network.run_vision(size)) if part == "vision" else lambda: network.run_decoder(size, before)
    return measure_layers(network.part(part), lambda: saved_bytes(network.model, run))


def saved_bytes(model: nn.Module, run: Callable[[], object]) -> float:
    """Bytes that autograd saves in `run`, shared storages once, without the model's parameters and buffers."""
    known = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _FusedAttention():
        run()
    return float(sum(storage.nbytes() for storage in saved.values()))


class _FusedAttention(TorchFunctionMode):
    """Attention as the kernels of GPUs compute it, which save no scores: on the meta device SDPA has none of them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return func(*args, **(kwargs or {}))
