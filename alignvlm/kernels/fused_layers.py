"""Liger's RMSNorm, SwiGLU and RoPE in the layers of one model; other models of the same classes stay as they are.

A layer is fused when its code is that of transformers' Llama, instruction by instruction: many backbones repeat that
code, and some with a small change. It must happen before DeepSpeed gets the model.
"""

from __future__ import annotations

import importlib.util
import inspect
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("RMSNorm", "SwiGLU", "RoPE")
ROPE = "apply_rotary_pos_emb"
"""What attention calls, a function of its own module."""


def choose_fused_layers(name: str, device: torch.device) -> bool:
    """Whether to fuse, for a recipe's `model.fused_layers` on this device.

    Raises:
        ValueError: when it is asked for and cannot run here.
    """
    available = device.type == "cuda" and _is_installed()
    if name == "liger" and not available:
        raise ValueError("model.fused_layers = 'liger' needs a CUDA device and the liger-kernel package; use 'auto'")
    return available and name != "none"


def takes_fused_layers(name: str) -> bool:
    """Whether a recipe's `model.fused_layers` would fuse on a GPU machine that has the packages of this one."""
    return name == "liger" or (name == "auto" and _is_installed())


def find_layers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Kind -> the modules that can be fused; those of RoPE are the attentions that apply it."""
    from transformers.activations import ACT2FN
    from transformers.models.llama import modeling_llama as llama

    found: dict[str, list[nn.Module]] = {kind: [] for kind in KINDS}
    norm, mlp, rope = map(_code, (llama.LlamaRMSNorm, llama.LlamaMLP, llama.apply_rotary_pos_emb))
    silu = type(ACT2FN["silu"])
    for module in model.modules():
        code, forward = _code(type(module)), _function(type(module))
        if code is None or forward is None:
            continue
        if code == norm:
            found["RMSNorm"].append(module)
        elif code == mlp and isinstance(module.act_fn, silu):
            found["SwiGLU"].append(module)
        elif ROPE in forward.__code__.co_names and _code(forward.__globals__.get(ROPE)) == rope:
            found["RoPE"].append(module)
    return found


def fuse_layers(model: nn.Module) -> dict[str, int]:
    """Let the model's layers compute with Liger's kernels; returns how many of each kind do."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu

    def rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
        # Not in place: where a residual is added to a norm's output, both have the same gradient.
        return liger_rms_norm(hidden_states, self.weight, self.variance_epsilon, in_place=False)

    def swiglu(self: Any, x: Tensor) -> Tensor:
        return self.down_proj(liger_swiglu(self.gate_proj(x), self.up_proj(x)))

    def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        return liger_rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)

    found = find_layers(model)
    for module in found["RMSNorm"]:
        module.forward = MethodType(rms_norm, module)
    for module in found["SwiGLU"]:
        module.forward = MethodType(swiglu, module)
    # The function below transformers' decorators: these have no such name.
    with_rope = {kind: _with_global(_function(kind), ROPE, rope) for kind in {type(module) for module in found["RoPE"]}}
    for module in found["RoPE"]:
        module.forward = MethodType(with_rope[type(module)], module)
    return {kind: len(modules) for kind, modules in found.items()}


def _is_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _function(thing: Any) -> FunctionType | None:
    """The Python function of a module's class, or of a function, below its decorators; None where there is none."""
    function = inspect.unwrap(getattr(thing, "forward", thing))
    return function if isinstance(function, FunctionType) else None


def _code(thing: Any) -> tuple[Any, ...] | None:
    """What a function computes, in a form that equals that of a copy: instructions, names, constants."""
    function = _function(thing)
    if function is None:
        return None
    code = function.__code__
    return code.co_code, code.co_names, tuple(value for value in code.co_consts if value != function.__doc__)


def _with_global(function: Any, name: str, value: Any) -> FunctionType:
    """A copy of a function for which one name of its module means something else."""
    copy = FunctionType(
        function.__code__, {**function.__globals__, name: value}, function.__name__, function.__defaults__,
        function.__closure__,
    )  # fmt: skip
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
