"""H-Reducer and C-Abstractor against the convolutions that their authors write, and windows against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignvlm.connectors import Sizes, build_connector
from alignvlm.connectors.options import CAbstractorOptions, HReducerOptions
from alignvlm.connectors.windows import join_windows
from tests.tiny import tiny_model


@pytest.mark.parametrize(("side", "window"), [(4, (2, 2)), (5, (2, 2)), (27, (1, 4)), (5, (3, 2)), (3, (1, 1))])
def test_windows_are_those_of_a_padded_convolution(side: int, window: tuple[int, int]) -> None:
    features = torch.randn(2, side**2, 6)
    image = features.transpose(1, 2).reshape(2, 6, side, side)
    padded = F.pad(image, (0, -side % window[1], 0, -side % window[0]))
    unfolded = F.unfold(padded, window, stride=window)  # [K, d * rows * columns, windows]
    expected = unfolded.unflatten(1, (6, -1)).permute(0, 3, 2, 1).flatten(2)
    assert torch.equal(join_windows(features, window), expected)


@pytest.mark.parametrize("side", [4, 6])  # 6 is padded to 8
def test_h_reducer_is_docowls_two_convolutions(side: int) -> None:
    d, hidden = 6, 10
    connector = build_connector(HReducerOptions(), Sizes(d, hidden, 50, side)).double()
    before = nn.Conv2d(d, 4 * d, (1, 4), stride=(1, 4)).double()
    after = nn.Conv2d(d, d, (1, 4), stride=(1, 4)).double()
    with torch.no_grad():
        for convolution, linear in ((before, connector.expand), (after, connector.reduce)):
            convolution.weight.copy_(linear.weight.unflatten(1, (4, d)).transpose(1, 2)[:, :, None])
            convolution.bias.copy_(linear.bias)
    features = torch.randn(3, side**2, d, dtype=torch.float64)
    image = F.pad(features.transpose(1, 2).reshape(3, d, side, side), (0, -side % 4))
    wide = F.gelu(before(image))  # [K, 4 d, s, s / 4]
    image = wide.unflatten(1, (4, d)).permute(0, 2, 3, 4, 1).flatten(3)  # channel x d + e to column 4 w + x
    tokens = connector.project(after(image).flatten(2).transpose(1, 2))
    expected = torch.cat([tokens, connector.eos.expand(3, 1, hidden)], dim=1)
    torch.testing.assert_close(connector(features, torch.empty(50, hidden)), expected)


def layer_norm(image: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Over the channels of [K, C, s, s]."""
    variance, mean = torch.var_mean(image, dim=1, keepdim=True, correction=0)
    normed = (image - mean) / (variance + 1e-5).sqrt()
    return normed * norm.weight[:, None, None] + norm.bias[:, None, None]


def reg_net_block(x: Tensor, block: nn.Module) -> Tensor:
    """timm's Bottleneck on [K, C, s, s], as its source has it."""
    point = lambda x, layer: F.conv2d(x, layer.weight[:, :, None, None], layer.bias)
    y = F.silu(layer_norm(point(x, block.enter), block.norm_enter))
    shifted = F.pad(y, (1, 1, 1, 1))
    kernel, (height, width) = block.depthwise.weight, y.shape[2:]
    y = sum(
        shifted[:, :, i : i + height, j : j + width] * kernel[:, 0, i, j, None, None]
        for i in range(3)
        for j in range(3)
    )
    y = F.silu(layer_norm(y, block.norm_depthwise))
    squeeze, _, excite, _ = block.excite
    y = y * torch.sigmoid(point(F.silu(point(y.mean((2, 3), keepdim=True), squeeze)), excite))
    y = layer_norm(point(y, block.leave), block.norm_leave)
    if len(block.shortcut):
        x = layer_norm(point(x, block.shortcut[0]), block.shortcut[1])
    return F.silu(y + x)


@pytest.mark.parametrize(("depth", "queries"), [(2, 9), (0, 16), (1, 64)])
def test_c_abstractor_is_honeybees(depth: int, queries: int) -> None:
    side, d = 7, 8
    options = CAbstractorOptions(num_queries=queries, hidden_size=12, depth=depth, mlp_depth=3)
    connector = build_connector(options, Sizes(d, 10, 50, side)).double()
    with torch.no_grad():
        for parameter in connector.parameters():  # also norms and biases
            parameter.add_(0.3 * torch.randn_like(parameter))
    features = torch.randn(2, side**2, d, dtype=torch.float64)
    x = (features + connector.positions.weight).transpose(1, 2).reshape(2, d, side, side)
    for block in connector.before:
        x = reg_net_block(x, block)
    x = F.adaptive_avg_pool2d(x, int(queries**0.5))
    for block in connector.after:
        x = reg_net_block(x, block)
    x = x.flatten(2).transpose(1, 2)
    for i in range(3):
        x = connector.readout[2 * i](F.silu(x) if i else x)
    torch.testing.assert_close(connector(features, torch.empty(50, 10)), x)


def test_they_start_as_their_authors_let_them() -> None:
    text = {"initializer_range": 0.5}  # of the LLM, which is none of their business
    reducer = tiny_model(connector={"kind": "h_reducer"}, text=text)[0].model.connector
    assert 0.9 < reducer.expand.weight.abs().max() * reducer.expand.in_features**0.5 <= 1  # as PyTorch's layers
    assert 0.5 < reducer.eos.std() < 1.5
    abstractor = tiny_model(connector={"kind": "c_abstractor", "num_queries": 4, "depth": 1}, text=text)[
        0
    ].model.connector
    for module in abstractor.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            assert 0.017 < module.weight.std() < 0.023
            assert getattr(module, "bias", None) is None or not module.bias.any()
