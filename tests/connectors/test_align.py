"""The ALIGN connector as a module: formula, temperature, active vocabulary, statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import layer_norm

from alignvlm.connectors import AlignConnector, AlignOptions, Sizes
from alignvlm.kernels.align import moments

SIZES = Sizes(6, 8, 50, side=2)
RELEASED = {"activation": "relu", "norm_output": True}
"""The form of the released low-resource code."""


def make(seed: int = 0, **options: object) -> tuple[AlignConnector, torch.Tensor, torch.Tensor]:
    """A connector 6 -> 8 over 50 tokens with uneven weights, features [2, 5, 6], embedding [50, 8]; all float64."""
    torch.manual_seed(seed)
    connector = AlignConnector(AlignOptions(**options), SIZES).double()  # type: ignore[arg-type]
    head = torch.randn(50, 8, dtype=torch.float64) + 0.5
    connector.start_from(head, head)
    with torch.no_grad():
        for name, parameter in connector.named_parameters():
            if parameter.dim() == 1 and not name.startswith("w1"):  # of the LayerNorms
                parameter += 0.3 * torch.randn_like(parameter)
    features = torch.randn(2, 5, 6, dtype=torch.float64)
    return connector, features, torch.randn(50, 8, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("norm_vocab", [True, False])
@pytest.mark.parametrize("norm_hidden", [True, False])
@pytest.mark.parametrize(("temperature", "form"), [(1.0, {}), (0.5, {}), (1.0, RELEASED)])
def test_formula(norm_vocab: bool, norm_hidden: bool, temperature: float, form: dict[str, object]) -> None:
    options = {"norm_vocab": norm_vocab, "norm_hidden": norm_hidden, "temperature": temperature}
    connector, features, embedding = make(**options, **form)
    h = features @ connector.w1.weight.T + connector.w1.bias
    h = layer_norm(h, (8,), connector.ln_hidden.weight, connector.ln_hidden.bias) if norm_hidden else h
    h = h * (h > 0) if form else h
    logits = h @ connector.w2.T
    if norm_vocab:
        logits = layer_norm(logits, (50,), connector.gamma, connector.beta)
    expected = torch.softmax(logits / temperature, dim=-1) @ embedding
    if form:
        expected = layer_norm(expected, (8,), connector.ln_output.weight, connector.ln_output.bias)
    found = connector(features, embedding)
    torch.testing.assert_close(found, expected)
    inputs = [embedding, *connector.parameters()]
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), inputs),
        torch.autograd.grad(expected.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_gain_is_the_initial_gamma() -> None:
    connector = AlignConnector(AlignOptions(gain=5.0), SIZES)
    assert torch.equal(connector.gamma.detach(), torch.full((50,), 5.0))
    assert connector.beta.count_nonzero() == 0


def test_w2_may_start_with_random_rows_that_are_spread_as_the_lm_head() -> None:
    torch.manual_seed(0)
    head = 0.1 + 0.3 * torch.randn(2000, 64)
    connector = AlignConnector(AlignOptions(w2_start="random"), Sizes(6, 64, 2000, side=2))
    connector.start_from(torch.zeros(2000, 64), head)
    w2 = connector.w2.detach()
    assert float(w2.mean()) == pytest.approx(0.1, abs=0.01)
    assert float(w2.std()) == pytest.approx(0.3, rel=0.02)
    alike = torch.nn.functional.cosine_similarity(w2 - 0.1, head - 0.1)
    assert float(alike.abs().mean()) < 0.2  # 1 / sqrt(64) between independent directions


def test_active_vocabulary_is_the_restricted_softmax() -> None:
    connector, features, embedding = make()
    p = connector.probabilities(features.flatten(0, 1)).double()
    ids = p.mean(0).argsort(descending=True)[:20]
    connector.keep_tokens(ids)
    assert connector.w2.shape == (20, 8)
    assert connector.gamma.shape == connector.beta.shape == (20,)
    kept = p[:, ids] / p[:, ids].sum(dim=1, keepdim=True)
    found = connector(features, embedding)
    torch.testing.assert_close(found.flatten(0, 1), kept @ embedding[ids], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(connector.probabilities(features.flatten(0, 1)).double(), kept, atol=1e-6, rtol=1e-6)
    grad = torch.autograd.grad(found.sum(), embedding)[0]
    assert set(grad.abs().sum(1).nonzero().flatten().tolist()) == set(ids.tolist())


def test_all_tokens_active_changes_nothing() -> None:
    connector, features, embedding = make()
    expected = connector(features, embedding)
    connector.keep_tokens(torch.randperm(50))
    torch.testing.assert_close(connector(features, embedding), expected)


def test_active_vocabulary_is_saved() -> None:
    connector, features, embedding = make()
    connector.keep_tokens(torch.tensor([4, 2, 9, 30]))
    other = AlignConnector(AlignOptions(num_active=4), SIZES).double()
    other.load_state_dict(connector.state_dict())
    torch.testing.assert_close(other(features, embedding), connector(features, embedding))


def test_active_vocabulary_takes_over_an_lm_head() -> None:
    head = torch.randn(50, 8, dtype=torch.float64)
    part = AlignConnector(AlignOptions(num_active=7), SIZES).double()
    part.active_ids.copy_(torch.tensor([7, 6, 5, 40, 41, 42, 0]))
    whole = AlignConnector(AlignOptions(), SIZES).double()
    whole.load_state_dict({k: v for k, v in part.state_dict().items() if k.startswith(("w1", "ln_"))}, strict=False)
    whole.start_from(head, head)
    part.start_from(head, head)
    whole.keep_tokens(part.active_ids)
    features, embedding = torch.randn(3, 6, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    torch.testing.assert_close(part(features, embedding), whole(features, embedding))


def test_inference_forgets_its_moments_when_training_goes_on() -> None:
    connector, features, embedding = make()
    many = features.repeat(4, 1, 1)
    trained = copy.deepcopy(connector)
    with torch.no_grad():
        connector.eval()
        connector(many, embedding)
        connector.train()
        connector.w2.data.mul_(2).add_(1).pow_(2)  # as optimizers do, unseen by version counters
        trained.w2.data.mul_(2).add_(1).pow_(2)
        connector.eval()
        torch.testing.assert_close(connector(many, embedding), trained(many, embedding))


def test_micro_batches_of_one_step_share_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    connector, features, embedding = make()
    connector, features, embedding = connector.bfloat16(), features.bfloat16(), embedding.detach().bfloat16()
    computed: list[torch.Tensor] = []
    original = moments.vocab_moments
    monkeypatch.setattr(moments, "vocab_moments", lambda w2: computed.append(w2) or original(w2))

    def step(num_micro_batches: int) -> list[torch.Tensor]:
        connector.zero_grad()
        for i in range(num_micro_batches):
            connector(features + i, embedding).float().square().sum().backward()
        return [parameter.grad.clone() for parameter in connector.parameters()]

    expected = step(3)
    with connector.same_weights():
        found = step(3)
    assert len(computed) == 1
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    connector.w2.data.mul_(2).add_(1)  # as optimizers do, unseen by version counters
    expected = step(1)
    with connector.same_weights():
        assert all(torch.equal(one, other) for one, other in zip(step(1), expected, strict=True))


def test_statistics_are_left_once() -> None:
    connector, features, embedding = make()
    connector.collect_statistics = True
    connector(features, embedding)
    p = connector.probabilities(features.flatten(0, 1))
    assert connector.last_statistics["top_mass"] == pytest.approx(float(p.amax(1).mean()))
    assert connector.last_statistics["entropy"] == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    connector.last_statistics = {}
    connector(features, embedding)
    assert connector.last_statistics == {}


def test_errors() -> None:
    connector, features, embedding = make()
    with pytest.raises(ValueError, match="embedding"):
        connector(features, embedding[:-1])
    with pytest.raises(ValueError, match="LM head"):
        connector.start_from(embedding, embedding[:-1])
    with pytest.raises(ValueError, match="num_active"):
        AlignConnector(AlignOptions(num_active=51), SIZES)
    for ids in ([1, 1], [50], [-1], []):
        with pytest.raises(ValueError, match="ids"):
            connector.keep_tokens(torch.tensor(ids, dtype=torch.int64))
    connector.keep_tokens(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="restricted already"):
        connector.keep_tokens(torch.tensor([1]))
