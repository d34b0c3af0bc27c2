"""Floating point operations of training, part by part. One multiply-add is two operations.

Matrix products and attention only, attention without a discount for causality: the convention of PaLM (arXiv
2204.02311, appendix B), in which model FLOPs utilisation is usually quoted. Recomputed activations are no model FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from alignvlm.config.schema import PARTS
from alignvlm.model.network import Dimensions, Network, matches


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

    def times(self, factor: float) -> Work:
        return Work(self.tokens * factor, self.tiles * factor, self.supervised * factor, self.attended * factor)

    def plus(self, other: Work) -> Work:
        return Work(
            self.tokens + other.tokens,
            self.tiles + other.tiles,
            self.supervised + other.supervised,
            self.attended + other.attended,
        )


@dataclass(frozen=True)
class PartFlops:
    """Model FLOPs of one part, and what is computed twice on purpose."""

    forward: float
    backward: float
    recomputed: float
    """Activations recomputed by checkpointing, and the logits that ALIGN's backward recomputes."""

    @property
    def model(self) -> float:
        """Forward and backward, without recomputation."""
        return self.forward + self.backward


def training_flops(
    network: Network, work: Work, trainable: Sequence[str] = ("*",), checkpointing: bool = False
) -> dict[str, PartFlops]:
    """FLOPs of `work` per part, frozen parameters accounted for.

    A part's backward costs one forward for the gradients of its trainable weights (in proportion to them), and one
    more for those of its inputs when anything before it, or inside it, learns. Attention has no weights and twice the
    products. Nothing runs backward before the first part that learns.
    """
    dims = network.dims
    forward = {
        "vision": _vision_forward(network, work),
        "connector": _connector_forward(network, work),
        "language": _language_forward(network, work),
    }
    result: dict[str, PartFlops] = {}
    learning_before = False
    for part in PARTS:
        linear, attention = forward[part]
        share = _trainable_share(network, part, trainable)
        learns = learning_before or share > 0
        backward = linear * share + (linear + 2 * attention if learns else 0.0)
        recomputed = linear + attention if checkpointing and learns and part != "connector" else 0.0
        if part == "connector" and dims.connector == "align":
            backward, recomputed = _align_backward(network, work, trainable, learning_before)
        result[part] = PartFlops(linear + attention, backward, recomputed)
        learning_before = learns
    return result


def linear_weights(module: nn.Module, skip: Sequence[nn.Module] = ()) -> int:
    """Elements of all matrices of linear and convolution layers: each costs two operations per token that enters."""
    skipped = {id(part) for part in skip}
    return sum(
        layer.weight.numel()
        for layer in module.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and id(layer) not in skipped
    )


def _vision_forward(network: Network, work: Work) -> tuple[float, float]:
    """(linear, attention): the encoder sees every patch of every tile, and attends within a tile."""
    dims = network.dims
    patches = work.tiles * dims.patches
    linear = 2 * linear_weights(network.part("vision")) * patches
    return linear, 4 * dims.vision_layers * dims.vision_size * dims.patches * patches


def _connector_forward(network: Network, work: Work) -> tuple[float, float]:
    """(linear, attention). ALIGN: W1, the logits and the weighted average, 2 N d D + 4 N D V (paper, equation 1)."""
    dims = network.dims
    visual = work.tiles * dims.tokens_per_tile
    if dims.connector == "align":
        return _align_products(dims, visual)
    module: Any = network.part("connector")
    if dims.connector == "ovis":
        return 2 * sum(p.numel() for p in module.parameters()) * visual, 0.0
    if dims.connector == "mlp":
        return 2 * linear_weights(module) * visual, 0.0
    context = work.tiles * dims.patches * dims.vision_size / dims.feature_size
    inner = module.latents.shape[1]
    linear = 2 * (linear_weights(module.project_in) * context + linear_weights(module.project_out) * visual)
    attention = 0.0
    for layer in module.layers:
        linear += 2 * linear_weights(layer.to_key_value) * (context + visual)
        linear += 2 * linear_weights(layer, [layer.to_key_value]) * visual
        attention += 4 * inner * visual * (context + visual) / max(work.tiles, 1)
    return linear, attention


def _align_products(dims: Dimensions, visual: float) -> tuple[float, float]:
    w1 = 2 * visual * dims.feature_size * dims.hidden_size
    return w1 + 4 * visual * dims.hidden_size * dims.vocab_size, 0.0


def _align_backward(
    network: Network, work: Work, trainable: Sequence[str], learning_before: bool
) -> tuple[float, float]:
    """(backward, recomputed): one product of 2 N D V each for dp, dE, dh and dW2, and one to recompute the logits."""
    dims = network.dims
    visual = work.tiles * dims.tokens_per_tile
    product = 2 * visual * dims.hidden_size * dims.vocab_size
    w1 = 2 * visual * dims.feature_size * dims.hidden_size
    learns_w1 = matches("connector.w1.weight", trainable)
    learns_w2 = matches("connector.w2", trainable)
    learns_h = learns_w1 or learning_before or matches("connector.ln_hidden.weight", trainable)
    learns_e = network.learns(network.embedding, trainable)
    if not (learns_w2 or learns_h or learns_e):
        return 0.0, 0.0
    into_logits = learns_w2 or learns_h
    backward = product * (into_logits + learns_e + learns_h + learns_w2) + w1 * (learns_w1 + learning_before)
    return backward, product


def _language_forward(network: Network, work: Work) -> tuple[float, float]:
    """(linear, attention): the decoder on every token, the LM head on supervised ones."""
    dims = network.dims
    language = network.part("language")
    head: Any = network.model.get_output_embeddings()
    linear = 2 * linear_weights(language, [head]) * work.tokens + 2 * network.head.numel() * work.supervised
    return linear, 4 * dims.num_layers * dims.attention_size * work.attended


def _trainable_share(network: Network, part: str, trainable: Sequence[str]) -> float:
    """Part of the matrices' elements whose gradients are wanted."""
    wanted = total = 0
    for name, parameter in network.model.named_parameters():
        if name.startswith(f"{part}.") and parameter.dim() > 1:
            total += parameter.numel()
            wanted += parameter.numel() * matches(name, trainable)
    return wanted / total if total else 0.0
