"""Floating point operations of training, counted by PyTorch while the parts run on the meta device.

One multiply-add is two operations. Matrix products and attention only, attention without a discount for causality: the
convention of PaLM (arXiv 2204.02311, appendix B), in which model FLOPs utilisation is usually quoted. Recomputed
activations are no model FLOPs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from alignvlm.config.schema import PARTS, RecomputeConfig
from alignvlm.model.network import Network, PerLayer, measure_layers

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
    pass recompute nothing.
    """
    recompute = recompute or RecomputeConfig()
    vision, connector, head, short, long = _passes(network, tuple(trainable))
    zero = np.zeros(2)
    linear, quadratic = _by_length(short.total, long.total)
    model = {
        "vision": np.stack([zero, vision.total, zero, zero], axis=1),
        "connector": np.stack([zero, connector, zero, zero], axis=1),
        "language": np.stack([linear, zero, head, quadratic], axis=1),
    }
    again = {part: np.zeros(4) for part in PARTS}
    if connector[1]:
        again["connector"][1] = network.connector.recomputed_flops(network.dims.tokens_per_tile)
    if vision.layer[1]:
        again["vision"][1] = vision.num_recomputed(recompute.vision) * vision.layer[0]
    if short.layer[1]:
        linear, quadratic = _by_length(short.layer, long.layer)
        again["language"][[0, 3]] = short.num_recomputed(recompute.language) * np.array([linear[0], quadratic[0]])
    return TrainingFlops({part: np.stack([*model[part], again[part]]) for part in PARTS})


@functools.lru_cache(maxsize=8)
def _passes(
    network: Network, trainable: tuple[str, ...]
) -> tuple[PerLayer, np.ndarray, np.ndarray, PerLayer, PerLayer]:
    """(forward, backward) of encoder, connector, head, and of the decoder with a short and a long document."""
    network.set_trainable(trainable)
    before = network.learns_before_decoder(trainable)
    vision = measure_layers(network.part("vision"), lambda: _count(lambda: network.run_vision(1)))
    connector = _count(lambda: network.run_connector(1, network.parameters("vision", trainable) > 0))
    hidden_learns = before or any(parameter.requires_grad for parameter in network.part("language").parameters())
    head = _count(lambda: network.run_head(1, hidden_learns))
    short, long = (_decoder(network, before, length) for length in (COUNTED_TOKENS, 2 * COUNTED_TOKENS))
    return vision, connector, head, short, long


def _count(run: Callable[[], torch.Tensor]) -> np.ndarray:
    """(forward, backward) FLOPs of what `run` computes."""
    with FlopCounterMode(display=False) as forward:
        output = run()
    own = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=own) as backward:
        if output.requires_grad:
            output.sum().backward()
    return np.array([forward.get_total_flops(), backward.get_total_flops()], dtype=float)


def _convolution_backward(
    output: Sequence[int], x: Sequence[int], weight: Sequence[int], *arguments: Any, out_shape: Any, **options: Any
) -> int:
    """FLOPs of a convolution's backward pass from shapes; PyTorch 2.13 counts groups' gradients as if there were one.

    `x` [K, C, h, w] and `weight` [C', C / groups, kernel] have a gradient each of as many FLOPs as the forward pass.
    """
    _bias, _stride, _padding, _dilation, transposed, _output_padding, _groups, needed = arguments[:8]
    places = math.prod((x if transposed else output)[2:])
    return 2 * x[0] * places * math.prod(weight) * sum(needed[:2])


def _decoder(network: Network, needs_grad: bool, length: int) -> PerLayer:
    """(forward, backward) of the decoder on one document of this length."""
    return measure_layers(network.part("language"), lambda: _count(lambda: network.run_decoder(length, needs_grad)))


def _by_length(short: np.ndarray, long: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(per token, per squared token of a document), from FLOPs of a document and of one twice as long."""
    quadratic = (long - 2 * short) / (2 * COUNTED_TOKENS**2)
    return short / COUNTED_TOKENS - quadratic * COUNTED_TOKENS, quadratic
