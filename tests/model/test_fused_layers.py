"""Liger's kernels in a model's layers: which layers, that losses and gradients stay, that other models stay."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from alignvlm.config.schema import StageConfig
from alignvlm.config.sections.stages import LoraConfig
from alignvlm.kernels.fused_layers import choose_fused_layers, find_layers, fuse_layers
from alignvlm.model.attention import SDPA
from alignvlm.model.lora import add_adapters
from tests.tiny import alone, pack, samples, tiny_model

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


class Rotate(torch.autograd.Function):
    """Rotation of [B, H, T, d] in place, as Liger's: the input's memory becomes the output, and so do gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        first, second = x.chunk(2, dim=-1)
        x.data.copy_(x * cos + torch.cat((-second, first), dim=-1) * sin)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return Rotate.apply(grad.contiguous(), cos, -sin), None, None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A package in the place of liger-kernel, with formulas of its own; the list fills with the names of calls."""
    made: list[str] = []

    def liger_rms_norm(x: Tensor, weight: Tensor, eps: float, in_place: bool = True) -> Tensor:
        made.append("RMSNorm")
        assert not in_place
        return weight * torch.nn.functional.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)

    def liger_swiglu(a: Tensor, b: Tensor) -> Tensor:
        made.append("SwiGLU")
        return a * torch.sigmoid(a) * b

    def liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> tuple[Tensor, ...]:
        made.append("RoPE")
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return Rotate.apply(q, cos, sin), Rotate.apply(k, cos, sin)

    package = ModuleType("liger_kernel.transformers.functional")
    for function in (liger_rms_norm, liger_swiglu, liger_rope):
        setattr(package, function.__name__, function)
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    return made


def step(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**batch, num_items_in_batch=3).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ({}, {"RMSNorm": 5, "SwiGLU": 2, "RoPE": 2}),
        ({"model_type": "qwen3", "head_dim": 8}, {"RMSNorm": 9, "SwiGLU": 2, "RoPE": 2}),
        # Gemma adds 1 to a norm's weight and has another activation, OLMo 2 rounds elsewhere and rotates in fp32.
        ({"model_type": "gemma", "head_dim": 8}, {"RMSNorm": 0, "SwiGLU": 0, "RoPE": 2}),
        ({"model_type": "olmo2"}, {"RMSNorm": 0, "SwiGLU": 2, "RoPE": 0}),
    ],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_fused_layers_compute_what_llamas_do(
    text: dict[str, Any], numbers: dict[str, int], recompute: bool, calls: list[str]
) -> None:
    (model, processor), (other, _) = tiny_model(text=text), tiny_model(text=text)
    batch = pack([processor.encode(s) for s in samples()])
    for each in (model, other):
        each.double().train()
        each.model.language_model.set_attn_implementation(SDPA)
    expected, expected_gradients = step(model, batch)
    assert fuse_layers(model) == numbers
    if recompute:
        model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    loss, gradients = step(model, batch)
    again = {"RMSNorm": -1, "SwiGLU": 0, "RoPE": 0} if recompute else {}  # the last norm lies behind the layers
    twice = {kind: number + again[kind] if again and number else 0 for kind, number in numbers.items()}
    assert {kind: calls.count(kind) for kind in numbers} == {kind: numbers[kind] + twice[kind] for kind in numbers}
    assert loss == pytest.approx(expected, rel=1e-7)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-6)
    calls.clear()
    assert step(other, batch)[0] == pytest.approx(expected, rel=1e-7)
    assert calls == []


def test_adapters_lie_in_fused_layers(calls: list[str]) -> None:
    """LoRA's layers are called by Liger's formulas too: losses and the gradients of both factors stay."""
    stage = StageConfig(name="tune", trainable=[], lora=LoraConfig(rank=4, dropout=0.3))
    found = []
    for fused in (False, True):
        model, processor = tiny_model()
        model.double().train()
        if fused:
            assert fuse_layers(model) == {"RMSNorm": 5, "SwiGLU": 2, "RoPE": 2}
        add_adapters(model, stage)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
        torch.manual_seed(7)
        found.append(step(model, alone(processor.encode(samples()[2]))))
    (expected, expected_gradients), (loss, gradients) = found
    assert calls
    assert loss == pytest.approx(expected, rel=1e-7)
    adapters = [name for name in gradients if "lora_" in name]
    assert len(adapters) == 2 * 2 * 7
    for name in adapters:
        assert gradients[name].abs().max() > 0
        torch.testing.assert_close(gradients[name], expected_gradients[name], rtol=1e-4, atol=1e-6)


def test_the_choice() -> None:
    assert not choose_fused_layers("auto", CPU)
    assert not choose_fused_layers("none", CUDA)
    with pytest.raises(ValueError, match=r"model.fused_layers = 'liger' needs a CUDA device and the liger-kernel"):
        choose_fused_layers("liger", CPU)


def test_an_encoder_with_layer_norms_has_none() -> None:
    model, _ = tiny_model()
    assert all(not layers for layers in find_layers(model.model.vision_tower).values())


@pytest.mark.cuda
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("recompute", [False, True])
def test_ligers_kernels_give_the_same_losses_and_gradients(model_type: str, recompute: bool) -> None:
    pytest.importorskip("liger_kernel", reason="fused layers are those of liger-kernel")
    text = {"model_type": model_type, "hidden_size": 256, "intermediate_size": 688, "head_dim": 64}
    model, processor = tiny_model(text=text)
    batch = {
        k: v.cuda() if isinstance(v, Tensor) else v for k, v in pack([processor.encode(s) for s in samples()]).items()
    }
    batch["cu_seqlens"] = batch["cu_seqlens"].cpu()
    model.cuda().train()
    model.model.language_model.set_attn_implementation(SDPA)
    exact, exact_gradients = step(model.double(), batch)
    expected, expected_gradients = step(model.float(), batch)
    assert sum(fuse_layers(model).values()) > 0
    if recompute:
        model.model.language_model.activation_checkpointing_enable({"use_reentrant": False})
    loss, gradients = step(model, batch)
    assert loss == pytest.approx(expected, rel=1e-5)
    largest = max(gradient.norm() for gradient in exact_gradients.values())
    for name, gradient in gradients.items():
        error = (gradient - exact_gradients[name]).norm()
        allowed = (expected_gradients[name] - exact_gradients[name]).norm()
        assert error <= 10 * allowed + 1e-5 * exact_gradients[name].norm() + 1e-7 * largest, name
    assert exact == pytest.approx(loss, rel=1e-4)
