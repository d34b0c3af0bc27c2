"""Which layers ZeRO-3 gathers and releases as wholes."""

from __future__ import annotations

from collections.abc import Sequence
from types import MethodType
from typing import Any

from torch import nn

from alignvlm.model import AlignVLMForConditionalGeneration
from alignvlm.model.network import largest_list


def gather_whole_layers(model: AlignVLMForConditionalGeneration) -> None:
    """Let ZeRO-3 gather and release a backbone's layer at once, not each of the dozen modules in it by itself.

    It takes a fraction of the host's time (`benchmarks/step_overhead.py`) and of the collectives.
    """
    from deepspeed.utils import set_z3_leaf_module

    for layer in whole_layers(model):
        set_z3_leaf_module(layer, True)
        remember_parameters(layer, list(layer.named_parameters()))


def remember_parameters(layer: nn.Module, found: Sequence[tuple[str, nn.Parameter]]) -> None:
    """Let a layer name these as its parameters, without a walk through its modules.

    DeepSpeed asks each whole layer at every gather and every release, half a dozen times in a micro-batch.
    """

    def named_parameters(self: nn.Module, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True) -> Any:
        if prefix or not recurse or not remove_duplicate:
            return type(self).named_parameters(self, prefix, recurse, remove_duplicate)
        return iter(found)

    layer.named_parameters = MethodType(named_parameters, layer)  # type: ignore[method-assign]


def whole_layers(model: AlignVLMForConditionalGeneration) -> list[nn.Module]:
    """The layers that ZeRO-3 may gather as wholes: all but a trained one before which nothing is trained.

    DeepSpeed takes the gradients of such a layer when that of its input is there. Where the input needs none, PyTorch
    calls the hook before the layer's backward pass, and DeepSpeed would take zeros.
    """
    base, embedding = model.model, model.get_input_embeddings()
    before = {
        base.vision_tower: [base.vision_tower.get_input_embeddings()],
        base.language_model: [base.vision_tower, base.connector, embedding],
    }
    found = []
    for part, modules in before.items():
        is_fed = any(map(_is_trained, modules))
        for layer in largest_list(part)[2]:
            if is_fed or not _is_trained(layer):
                found.append(layer)
            is_fed = is_fed or _is_trained(layer)
    return found


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
