"""LoRA (arXiv 2106.09685): adapters of a model's linear layers, and the weights that they make of them.

PEFT puts the adapters into the model. A layer `x Wᵀ` becomes `x Wᵀ + alpha/rank · dropout(x) Aᵀ Bᵀ`, W frozen; its
parameters are called `<layer>.base_layer.weight`, `<layer>.lora_A.default.weight` and `<layer>.lora_B.default.weight`.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from alignvlm.config.schema import StageConfig
from alignvlm.config.sections.stages import LoraConfig
from alignvlm.errors import UserError
from alignvlm.parts import module_name, part_of, public_name
from data_pipeline.order.hashing import hash_key

T = TypeVar("T")
_ADAPTED = ".base_layer."
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.default\.weight")


class LoraError(UserError):
    """A stage's adapters cannot be what the recipe says; `key` is the setting."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(f"{key} {message}")
        self.key = key


def lora_of(stage: StageConfig) -> LoraConfig:
    """The settings of a stage that has adapters."""
    assert stage.lora is not None
    return stage.lora


def check_peft(stage: StageConfig) -> None:
    """Raise LoraError where the package is not installed that puts adapters into models."""
    if importlib.util.find_spec("peft") is None:
        raise LoraError(f"stages.{stage.name}.lora", "needs the package peft: pip install 'alignvlm[train]'")


def _peft(stage: StageConfig) -> Any:
    check_peft(stage)
    import peft  # takes seconds of CPU time, which other stages need not wait for

    return peft


def find_targets(model: Any, stage: StageConfig) -> list[str]:
    """Names of the layers that the stage gives adapters, as the model calls them, in its order.

    Raises:
        LoraError: one of the globs names no such layer, or the stage trains such a layer's own weight.
    """
    key = f"stages.{stage.name}.lora.targets"
    modules = {public_name(f"{name}.").rstrip("."): module for name, module in model.named_modules() if name}
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    reasons = {name: _why_not(model, name, module, places) for name, module in modules.items()}
    found = set()
    for index, glob in enumerate(lora_of(stage).targets):
        named = [name for name in modules if fnmatchcase(name, glob)]
        layers = [name for name in named if not reasons[name]]
        if not layers:
            why = next((reason for name in named if (reason := reasons[name]) and reason != _NO_LAYER), "")
            raise LoraError(f"{key}[{index}]", f"is {glob!r}, {why or 'which matches no linear layer'}")
        found |= set(layers)
    for name in (name for name in modules if name in found):
        for parameter, _ in modules[name].named_parameters():
            trained = [glob for glob in stage.trainable if fnmatchcase(f"{name}.{parameter}", glob)]
            if trained:
                raise LoraError(
                    f"stages.{stage.name}.trainable",
                    f"has {trained[0]!r}, which trains {name}.{parameter}; that stays as it is beside its adapter: "
                    "name it in one of trainable and lora.targets only",
                )
    return [module_name(f"{name}.").rstrip(".") for name in modules if name in found]


def adapted_weights(model: Any, stage: StageConfig) -> list[str]:
    """Public names of the weights that the stage's adapters change; [] without adapters."""
    return [public_name(f"{layer}.weight") for layer in find_targets(model, stage)] if stage.lora else []


_NO_LAYER = "no layer"


def _why_not(model: Any, name: str, module: nn.Module, places: Mapping[int, int]) -> str:
    """Why this module takes no adapter; empty where it does.

    Args:
        places: a parameter's id -> in how many places the model has it.
    """
    if module is model.get_output_embeddings():
        own = next(public_name(n) for n, p in model.named_parameters() if p is module.weight)  # the embedding's if tied
        return (
            "the LM head: the loss reads its weight without calling it, so an adapter would have no effect; train it "
            f"in full (trainable: [{own}])"
        )
    if isinstance(module, nn.Embedding):
        return (
            "an embedding, whose weight is read as a table without calling it, so an adapter would have no effect; "
            f"train it in full (trainable: [{name}.*])"
        )
    if not isinstance(module, nn.Linear) or part_of(name) == "connector":
        return _NO_LAYER
    if type(module) is not nn.Linear:
        return f"a {type(module).__name__}, which does not compute as a linear layer does"
    if places[id(module.weight)] > 1:
        return "a layer that shares its weight with another one, which an adapter would change too when it is merged"
    return ""


def add_adapters(model: Any, stage: StageConfig, seed: int = 0) -> None:
    """Put the stage's adapters into a loaded model; the same ones for any number of ranks and any ZeRO stage.

    Raises:
        UserError: PEFT is not installed, or as `find_targets` raises it.
    """
    peft, targets = _peft(stage), find_targets(model, stage)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash_key(seed, stage.name, "lora"))
        peft.inject_adapter_in_model(_peft_config(stage, model, targets), model)
    del model.peft_config  # transformers would save adapters instead of the model


def take_out(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Leave the layers without their adapters; returns (A, B) of each by the layer's name."""
    found = {}
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
            found[name] = (module.lora_A["default"].weight, module.lora_B["default"].weight)
    return found


@dataclass(frozen=True)
class Adapters:
    """What a stage has trained of its adapters; fp32, on the CPU."""

    stage: StageConfig
    base: Path
    """The export that the stage began with."""
    factors: Mapping[str, tuple[Tensor, Tensor]]
    """A layer's name -> A [rank, d_in] and B [d_out, rank]."""

    @classmethod
    def split_off(cls, stage: StageConfig, base: Path, weights: dict[str, T], read: Callable[[T], Tensor]) -> Adapters:
        """Take the factors out of a mapping of names to weights; what is left gets its name without adapters."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name in list(weights):
            if match := _FACTOR.fullmatch(name):
                parts.setdefault(match[1], {})[match[2]] = read(weights.pop(name))
            elif _ADAPTED in name:
                weights[name.replace(_ADAPTED, ".")] = weights.pop(name)
        return cls(stage, base, {layer: (pair["A"], pair["B"]) for layer, pair in parts.items()})

    def merge(self, name: str, weight: Tensor) -> Tensor:
        """The weight [d_out, d_in] of that name with its adapter in it, fp32; any other as it is."""
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or layer not in self.factors:
            return weight
        a, b = self.factors[layer]
        return torch.addmm(weight.float(), b, a, alpha=lora_of(self.stage).scale)

    def save(self, folder: Path, model: Any, weights: Mapping[str, Tensor]) -> None:
        """Write them as PEFT does, for the model in `base`; modules that the stage trained in full come along.

        Args:
            model: without adapters.
            weights: its weights after the stage, by name.
        """
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {}
        for layer, (a, b) in self.factors.items():
            tensors |= {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}
        modules = _trained_modules(model, self.stage.trainable)
        for module in modules:
            mine = (name for name in weights if name.startswith(f"{module}."))
            tensors |= {name: weights[name].clone() for name in mine}  # the file may not hold tied ones as one
        config = _peft_config(self.stage, model, list(self.factors))
        config.base_model_name_or_path, config.inference_mode = str(self.base), True
        config.modules_to_save = modules or None
        config.save_pretrained(folder)
        tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _trained_modules(model: Any, trainable: Sequence[str]) -> list[str]:
    """The modules that hold parameters which the globs match: whole parts, else the innermost; tied ones both."""
    is_trained = lambda name: any(fnmatchcase(public_name(name), glob) for glob in trainable)
    trained = {id(parameter) for name, parameter in model.named_parameters() if is_trained(name)}
    found: list[str] = []
    for name, module in model.named_modules():
        mine = [id(parameter) for parameter in module.parameters()]
        is_whole = name.startswith("model.") and name.count(".") == 1 and bool(mine) and set(mine) <= trained
        is_inner = any(id(parameter) in trained for parameter in module.parameters(recurse=False))
        if (is_whole or is_inner) and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)
    return found


def _peft_config(stage: StageConfig, model: nn.Module, layers: list[str]) -> Any:
    lora = lora_of(stage)
    return _peft(stage).LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        init_lora_weights=True if lora.init == "kaiming" else lora.init,
        target_modules=_pattern([name for name, _ in model.named_modules()], layers),
    )


def _pattern(names: list[str], layers: list[str]) -> str:
    """A regular expression that fits the names of these layers and no other: a number stands for all where it may."""
    shapes = sorted({re.sub(r"\.\d+\.", ".N.", layer) for layer in layers})
    pattern = "|".join(re.escape(shape).replace(r"\.N\.", r"\.\d+\.") for shape in shapes)
    if {name for name in names if re.fullmatch(pattern, name)} == set(layers):
        return pattern
    return "|".join(map(re.escape, layers))
