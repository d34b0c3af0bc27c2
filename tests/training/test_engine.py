"""What the engine does to a model and an optimizer before training; DeepSpeed itself runs in tests/integration."""

from __future__ import annotations

from fnmatch import fnmatchcase
from types import SimpleNamespace

import pytest

from alignvlm.model.network import largest_list
from alignvlm.parts import public_name
from alignvlm.training.engine import look_at_the_norm_only
from alignvlm.training.zero3.layers import gather_whole_layers, whole_layers
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("trainable", "not_whole"),
    [
        ("*", []),
        ("connector.*", []),
        ("language.*", []),
        ("vision.*layers.*", ["vision 0"]),
        ("vision.*layers.1.*", ["vision 1"]),
        ("vision.*post_layernorm.*", []),
        ("language.*layers.*", ["language 0"]),
        ("language.*layers.1.mlp.*", ["language 1"]),
        ("*.layers.*", ["vision 0"]),
    ],
)
def test_layers_that_get_no_gradient_of_their_input_are_not_gathered_whole(
    trainable: str, not_whole: list[str]
) -> None:
    model, _ = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(fnmatchcase(public_name(name), trainable))
    assert any(parameter.requires_grad for parameter in model.parameters())
    layers = {
        f"{part} {number}": layer
        for part in ("vision", "language")
        for number, layer in enumerate(largest_list(model.model.part(part))[2])
    }
    whole = whole_layers(model)
    assert [name for name, layer in layers.items() if layer not in whole] == not_whole
    assert len(whole) == len(layers) - len(not_whole)


def test_a_layer_gathered_whole_names_its_parameters_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without a walk through its modules, which DeepSpeed would have it take several times in a micro-batch."""
    model, _ = tiny_model()
    layer = largest_list(model.model.part("language"))[2][0]
    questions = [{}, {"prefix": "a.b"}, {"recurse": False}, {"remove_duplicate": False}]
    expected = [[(name, id(p)) for name, p in layer.named_parameters(**asked)] for asked in questions]
    gather_whole_layers(model)
    assert [[(name, id(p)) for name, p in layer.named_parameters(**asked)] for asked in questions] == expected
    monkeypatch.setattr(type(layer), "named_modules", lambda *_, **__: pytest.fail("it walks"))
    assert [id(p) for p in layer.parameters()] == [number for _, number in expected[0]]


@pytest.mark.parametrize(
    ("changes", "looks"),
    [({}, False), ({"compute_grad_norm": False}, True), ({"cpu_offload": True}, True)],
)
def test_gradients_are_looked_at_where_no_norm_would_tell(changes: dict[str, bool], looks: bool) -> None:
    settings = {"check_grad_overflow": True, "compute_grad_norm": True, "cpu_offload": False} | changes
    looked: list[bool] = []
    optimizer = SimpleNamespace(**settings, check_overflow=lambda partition_gradients: looked.append(True))
    look_at_the_norm_only(optimizer)
    optimizer.check_overflow(partition_gradients=True)
    assert looked == [True] * looks
