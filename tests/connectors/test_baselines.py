"""Baselines of the comparison against formulas written independently, in float64, and their starts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from alignvlm.connectors import Connector, Sizes, build_connector, connector_options
from alignvlm.connectors.options import OvisOptions, PerceiverOptions
from alignvlm.connectors.ovis import OvisConnector
from alignvlm.connectors.perceiver import PerceiverConnector

SIZES = Sizes(6, 8, 50, side=3)


def uneven(connector: Connector) -> dict[str, Tensor]:
    """Every parameter of the connector moved away from its start, float64."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in connector.double().parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return dict(connector.named_parameters())


def check(connector: Connector, found: Tensor, expected: Tensor, features: Tensor) -> None:
    """Values and gradients agree, and a gradient reaches every parameter."""
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)  # a plain sum would be blind to what normalised rows sum up to
    inputs = [features, *connector.parameters()]
    gradients = [torch.autograd.grad((out * weights).sum(), inputs) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 1e-6


@pytest.mark.parametrize("indicators", [True, False])
@pytest.mark.parametrize("norm_vocab", [True, False])
def test_ovis_is_its_formula(norm_vocab: bool, indicators: bool) -> None:
    options = OvisOptions(visual_vocab_size=40, norm_vocab=norm_vocab, indicators=indicators)
    connector = OvisConnector(options, SIZES)
    weights = uneven(connector)
    features = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    logits = linear(features, weights["head"])
    if norm_vocab:
        logits = layer_norm(logits, (40,), weights["gamma"], weights["beta"], 1e-5)
    expected = torch.einsum("ktv,vd->ktd", torch.softmax(logits, dim=-1), weights["table"])
    if indicators:
        start, end = (weights["indicators"][i].repeat(2, 1, 1) for i in (0, 1))
        expected = torch.cat([start, expected, end], dim=1)
    assert expected.shape[1] == connector.tokens_per_tile(options, 3)
    check(connector, connector(features, torch.zeros(50, 8)), expected, features)


@pytest.mark.parametrize("hidden_size", [None, 10])
def test_perceiver_is_its_formula(hidden_size: int | None) -> None:
    options = PerceiverOptions(hidden_size=hidden_size, num_latents=5, num_layers=2, num_heads=3, head_dim=4)
    connector = PerceiverConnector(options, SIZES)
    weights = uneven(connector)
    features = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([perceiver_of_one_tile(tile, weights) for tile in features])
    assert expected.shape[1] == connector.tokens_per_tile(options, 3)
    check(connector, connector(features, torch.zeros(50, 8)), expected, features)


def perceiver_of_one_tile(tile: Tensor, weights: dict[str, Tensor], heads: int = 3, width: int = 4) -> Tensor:
    """Head by head, with the softmax written out: [T, d] to [L, D]."""

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    if "project_in.weight" in weights:
        tile = tile @ weights["project_in.weight"].T + weights["project_in.bias"]
    latents = weights["latents"]
    for layer in ("layers.0", "layers.1"):
        queries = norm(latents, f"{layer}.norm_latents")
        media = torch.cat([norm(tile, f"{layer}.norm_context"), queries])
        keys_values = media @ weights[f"{layer}.to_key_value.weight"].T
        read = []
        for head in range(heads):
            own = slice(head * width, (head + 1) * width)
            q = queries @ weights[f"{layer}.to_query.weight"][own].T
            k, v = keys_values[:, own], keys_values[:, heads * width :][:, own]
            scores = (q @ k.T / width**0.5).exp()
            read.append(scores / scores.sum(1, keepdim=True) @ v)
        latents = latents + torch.cat(read, dim=1) @ weights[f"{layer}.to_out.weight"].T
        inner = norm(latents, f"{layer}.feed_forward.0") @ weights[f"{layer}.feed_forward.1.weight"].T
        latents = latents + gelu(inner) @ weights[f"{layer}.feed_forward.3.weight"].T
    out = norm(latents, "norm") @ weights["project_out.0.weight"].T + weights["project_out.0.bias"]
    return gelu(out) @ weights["project_out.2.weight"].T + weights["project_out.2.bias"]


@pytest.mark.parametrize(("start", "mean", "std"), [("text", 0.2, 0.5), ("normal", 0.0, 1.0)])
def test_the_table_of_ovis_starts_as_the_recipe_says(start: str, mean: float, std: float) -> None:
    torch.manual_seed(0)
    options = connector_options({"kind": "ovis", "visual_vocab_size": 3000, "table_start": start, "indicators": True})
    connector = build_connector(options, Sizes(6, 64, 900, side=3))
    embedding = 0.2 + 0.5 * torch.randn(900, 64)
    connector.start_from(embedding, embedding)
    for weight, close in ((connector.table.detach(), 0.01), (connector.indicators.detach(), 0.2)):
        assert float(weight.mean()) == pytest.approx(mean, abs=close)
        assert float(weight.std()) == pytest.approx(std, abs=close)


def test_micro_batches_of_one_step_share_the_moments_of_ovis() -> None:
    connector = OvisConnector(OvisOptions(visual_vocab_size=40), SIZES).bfloat16()
    features, embedding = torch.randn(2, 9, 6).bfloat16(), torch.zeros(50, 8).bfloat16()

    def gradients() -> list[Tensor]:
        connector.zero_grad()
        for scale in (1, 2):
            connector(features * scale, embedding).float().square().sum().backward()
        return [parameter.grad for parameter in connector.parameters()]

    expected = gradients()
    with connector.same_weights():
        assert all(torch.equal(one, other) for one, other in zip(gradients(), expected, strict=True))
