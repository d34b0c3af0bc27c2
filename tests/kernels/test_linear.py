"""The linear layers of ZeRO-3: PyTorch's own results and gradients, the parameter kept and no view of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from alignvlm.kernels.linear import keep_parameters
from tests.kernels.align.cases import Products


@pytest.mark.parametrize("shape", [(7,), (5, 7), (2, 5, 7)])
@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_pytorchs(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    expected = nn.Linear(7, 3, bias=bias).double()
    found = copy.deepcopy(expected)
    assert keep_parameters(found) == 1
    inputs = [torch.randn(shape).double().requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    outputs = [layer(x) for layer, x in zip((expected, found), inputs, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0])
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    for one, other in zip([inputs[0], *expected.parameters()], [inputs[1], *found.parameters()], strict=True):
        torch.testing.assert_close(other.grad, one.grad)


def test_what_needs_no_gradient_gets_none() -> None:
    layer = nn.Linear(4, 3)
    keep_parameters(layer)
    layer.weight.requires_grad_(False)
    x, kept = torch.randn(2, 4, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    assert [tensor.shape for tensor in kept] == [layer.weight.shape]  # the input serves the weight's gradient only
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2, 3) @ layer.weight)
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_backward_reads_the_weight_that_is_there_then() -> None:
    """ZeRO-3 takes the weight away after the forward pass and gathers it again, in other memory, for the backward."""
    layer = nn.Linear(4, 3, bias=False)
    keep_parameters(layer)
    x, weight = torch.randn(2, 4, requires_grad=True), layer.weight.detach().clone()
    y = layer(x)
    layer.weight.data = torch.empty(0)
    layer.weight.data = weight
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(2, 3) @ weight)


@pytest.mark.parametrize("bias", [True, False])
def test_a_recomputed_layer_ends_before_its_last_product(bias: bool) -> None:
    """As with PyTorch's own linear layers: what the last one returns is in no gradient."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 8, bias=bias), nn.GELU(), nn.Linear(8, 6, bias=bias))
    flops, gradients = [], []
    for ours, is_recomputed in ((False, True), (True, True), (True, False)):
        model = copy.deepcopy(layer)
        assert keep_parameters(model) == 2 if ours else True
        x = torch.linspace(0, 1, 20).view(5, 4).requires_grad_()
        with Products() as counted:
            output = checkpoint(model, x, use_reentrant=False) if is_recomputed else model(x)
            output.square().sum().backward()
        flops.append(counted.flops)
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert all(map(torch.equal, gradients[1], gradients[2]))
    first_product = 2 * 5 * 4 * 8
    assert flops[0] == flops[1] == flops[2] + first_product


def test_other_kinds_of_linear_layer_stay() -> None:
    assert (
        keep_parameters(nn.ModuleList([nn.Bilinear(2, 2, 2), nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)]))
        == 0
    )
