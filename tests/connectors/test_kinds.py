"""Every kind of connector: its size, its visual tokens, and every shipped recipe with it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from alignvlm.config import list_recipes, load_recipe
from alignvlm.connectors import Sizes, build_connector, connector_options
from alignvlm.connectors.options import BUILT_IN
from alignvlm.errors import UserError
from alignvlm.estimates import estimate_run
from alignvlm.model.build import load_processor
from alignvlm.model.network import build_network
from tests.tiny import CONNECTORS

MLP = 1152 * 3072 + 3072 + 3072**2 + 3072
PUBLISHED = [
    ({"kind": "align"}, 3_542_016 + 2 * 3072 + 128_256 * (3072 + 2), 729),
    ({"kind": "mlp"}, MLP, 729),
    ({"kind": "ovis"}, 8192 * (1152 + 3072 + 2), 729),
    ({"kind": "ovis", "visual_vocab_size": 131_072, "indicators": True}, 131_072 * (1152 + 3072 + 2) + 2 * 3072, 731),
    ({"kind": "perceiver"}, 3 * 12_983_040 + 64 * 1152 + 2 * 1152 + MLP, 64),
    ({"kind": "h_reducer"}, 4608**2 + 4608 + 4608 * 1152 + 1152 + 1152 * 3072 + 3072 + 3072, 27 * 7 + 1),
    ({"kind": "h_reducer", "eos": False}, 4608**2 + 4608 + 4608 * 1152 + 1152 + 1152 * 3072 + 3072, 27 * 7),
    ({"kind": "c_abstractor"}, 4_016_416 + 5 * 2_638_080 + 12_589_056 + 729 * 1152, 144),
    ({"kind": "c_abstractor", "depth": 0, "num_queries": 256}, MLP + 729 * 1152, 256),
]
"""Parameters between SigLIP-400M and Llama-3.2-3B, layer by layer by hand, and visual tokens of a tile."""


def test_all_kinds_are_tested() -> None:
    assert {connector["kind"] for connector in CONNECTORS.values()} == set(BUILT_IN)


@pytest.mark.parametrize(("saved", "parameters", "tokens"), PUBLISHED)
def test_parameters_and_tokens_are_those_of_the_original(saved: dict, parameters: int, tokens: int) -> None:
    options = connector_options(saved)
    with torch.device("meta"):
        connector = build_connector(options, Sizes(1152, 3072, 128_256, side=27))
        output = connector(torch.empty(2, 729, 1152), torch.empty(128_256, 3072))
    assert sum(parameter.numel() for parameter in connector.parameters()) == parameters
    assert connector.tokens_per_tile(options, 27) == tokens
    assert output.shape == (2, tokens, 3072)


def test_queries_that_are_no_square_are_an_error_of_the_recipe() -> None:
    recipe = load_recipe("low_resource_3b", ["model.connector={kind: c_abstractor, num_queries: 145}"])
    for use in (load_processor, build_network):
        with pytest.raises(UserError, match=r"model.connector.num_queries = 145 is not a square number"):
            use(recipe)


@pytest.mark.parametrize("kind", BUILT_IN)
@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_works_with_every_connector(name: str, kind: str) -> None:
    recipe = load_recipe(name, [f"model.connector.kind={kind}"])
    first = replace(recipe, stages=dict(list(recipe.stages.items())[:1]))
    estimate = estimate_run(first, recipe.train.processes)
    assert estimate.connector == kind
    assert estimate.stages[0].flops["connector"].backward > 0
    assert estimate.stages[0].trainable["connector"] == estimate.parameters["connector"] > 0
