"""Floating point operations of training, counted by PyTorch while the parts run on the meta device.

One multiply-add is two operations. Matrix products and attention only, attention without a discount for causality: the
convention of PaLM (arXiv 2204.02311, appendix B), in which model FLOPs utilisation is usually quoted. Recomputed
activations are no model FLOPs.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from alignvlm.config.schema import RecomputeConfig
from alignvlm.model.network import Network, PerLayer, largest_list, measure_layers

COUNTED_TOKENS = 16
"""Length of the document whose decoder pass is counted, and half that of the second one."""


@dataclass(frozen=True)
class Work:
    """What is computed: of a sample, a micro-batch or a stage alike, because every cost is linear in these."""

    tokens: float
    """Tokens that enter the LLM, visual ones included."""
    tiles: float
    supervised: float
    """Tokens with a loss: the LM head runs on them only."""
    attended: float
    """Sum over documents of their squared length."""


@dataclass(frozen=True)
class PartFlops:
    """Model FLOPs of one part, and what is computed twice on purpose."""

    forward: float
    backward: float
    recomputed: float
    """Activations recomputed by checkpointing, and what the connector's backward recomputes (ALIGN: the logits)."""

    @property
    def model(self) -> float:
        """Forward and backward, without recomputation."""
        return self.forward + self.backward


@dataclass(frozen=True)
class TrainingFlops:
    """FLOPs of a training step as a linear function of its work."""

    rates: Mapping[str, np.ndarray]
    """Part -> [3, 4]: forward, backward and recomputed FLOPs per unit of each field of `Work`."""

    def of(self, work: Work) -> dict[str, PartFlops]:
        """Part -> FLOPs of this work."""
        units = astuple(work)
        return {part: PartFlops(*(rates @ units).tolist()) for part, rates in self.rates.items()}


def count_flops(
    network: Network, trainable: Sequence[str] = ("*",), recompute: RecomputeConfig | None = None
) -> TrainingFlops:
    """Count a forward and a backward pass of each part with these parameters learning; under a second for 8B.

    A part's backward begins where autograd finds something that learns, in it or before it. Layers without a backward
    pass recompute nothing; others end, as PyTorch ends them, when they have saved all that their backward pass needs.
    """
    recompute = recompute or RecomputeConfig()
    vision, connector, head, short, long = _passes(network, tuple(trainable))
    zero = np.zeros(3)
    linear, quadratic = _by_length(short.total, long.total)
    rates = {
        "vision": np.stack([zero, vision.total, zero, zero], axis=1),
        "connector": np.stack([zero, connector, zero, zero], axis=1),
        "language": np.stack([linear, zero, head, quadratic], axis=1),
    }
    rates["vision"][2] *= vision.num_recomputed(recompute.vision) / vision.num_layers
    rates["language"][2] *= short.num_recomputed(recompute.language) / short.num_layers
    if connector[1]:
        rates["connector"][2, 1] = network.connector.recomputed_flops(network.dims.tokens_per_tile)
    return TrainingFlops(rates)


@functools.lru_cache(maxsize=8)
def _passes(
    network: Network, trainable: tuple[str, ...]
) -> tuple[PerLayer, np.ndarray, np.ndarray, PerLayer, PerLayer]:
    """`_count` of encoder, connector, head, and of the decoder with a short and a long document."""
    network.set_trainable(trainable)
    before = network.learns_before_decoder(trainable)
    vision = _measure(network.part("vision"), lambda: network.run_vision(1))
    connector = _count(lambda: network.run_connector(1, network.parameters("vision", trainable) > 0))
    hidden_learns = before or any(parameter.requires_grad for parameter in network.part("language").parameters())
    head = _count(lambda: network.run_head(1, hidden_learns))
    decoder = lambda length: _measure(network.part("language"), lambda: network.run_decoder(length, before))
    return vision, connector, head, decoder(COUNTED_TOKENS), decoder(2 * COUNTED_TOKENS)


def _measure(part: nn.Module, run: Callable[[], torch.Tensor]) -> PerLayer:
    """`_count` of a part and of its layers."""
    return measure_layers(part, lambda: _count(run, largest_list(part)[2]))


def _count(run: Callable[[], torch.Tensor], layers: Iterable[nn.Module] = ()) -> np.ndarray:
    """(forward, backward, recomputed) FLOPs of what `run` computes; the last if all these layers are recomputed."""
    with FlopCounterMode(display=False) as forward, _until_saved(layers, forward) as recomputed:
        output = run()
    own = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=own) as backward:
        if output.requires_grad:
            output.sum().backward()
    return np.array([forward.get_total_flops(), backward.get_total_flops(), sum(recomputed)], dtype=float)


@contextlib.contextmanager
def _until_saved(layers: Iterable[nn.Module], counter: FlopCounterMode) -> Iterator[list[int]]:
    """FLOPs of each layer that runs, until it has saved its last tensor: there PyTorch ends its recomputation.

    A linear layer saves before its product, so a layer that ends with one does not compute that product again.
    """
    found: list[int] = []
    saved = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal saved
        saved = counter.get_total_flops()
        return tensor

    def begin(*_: Any) -> None:
        nonlocal saved
        saved = counter.get_total_flops()
        found.append(-saved)

    def end(*_: Any) -> None:
        found[-1] += saved

    hooks = [
        hook for each in layers for hook in (each.register_forward_pre_hook(begin), each.register_forward_hook(end))
    ]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield found
    finally:
        for hook in hooks:
            hook.remove()


def _convolution_backward(
    output: Sequence[int], x: Sequence[int], weight: Sequence[int], *arguments: Any, out_shape: Any, **options: Any
) -> int:
    """FLOPs of a convolution's backward pass from shapes; PyTorch 2.13 counts groups' gradients as if there were one.

    `x` [K, C, h, w] and `weight` [C', C / groups, kernel] have a gradient each of as many FLOPs as the forward pass.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, needed = arguments[:8]
    places = math.prod((x if transposed else output)[2:])
    return 2 * x[0] * places * math.prod(weight) * sum(needed[:2])


def _by_length(short: np.ndarray, long: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(per token, per squared token of a document), from FLOPs of a document and of one twice as long."""
    quadratic = (long - 2 * short) / (2 * COUNTED_TOKENS**2)
    return short / COUNTED_TOKENS - quadratic * COUNTED_TOKENS, quadratic
