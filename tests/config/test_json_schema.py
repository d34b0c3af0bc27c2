"""The JSON schema for editors takes what the loader takes, and refuses what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from alignvlm.config import find_recipe, list_recipes, load_recipe, recipe_to_dict
from alignvlm.config.json_schema import json_schema
from alignvlm.config.tree import read_tree


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_shipped_recipes_fit_as_written_and_resolved(validator: Draft202012Validator) -> None:
    for name in list_recipes():
        validator.validate(read_tree(find_recipe(name)).plain())
        validator.validate(recipe_to_dict(load_recipe(name)))


@pytest.mark.parametrize(
    "text",
    [
        "sede: 1",
        "stages: {connector: {epochs: 0}}",
        "stages: {connector: {name: x}}",
        "model: {connector: {kind: mlp, num_latents: 3}}",
        "model: {connector: {kind: other}}",
        "train: {precision: fp8}",
    ],
)
def test_mistakes_do_not_fit(validator: Draft202012Validator, text: str) -> None:
    assert list(validator.iter_errors(yaml.safe_load(text)))


@pytest.mark.parametrize("options", ["{}", "{hidden_size: 4}", "{kind: mlp, hidden_size: 4}"])
def test_the_kind_of_a_connector_may_be_inherited(validator: Draft202012Validator, options: str) -> None:
    validator.validate(yaml.safe_load(f"{{extends: other, model: {{connector: {options}}}}}"))


def test_keys_are_described(validator: Draft202012Validator) -> None:
    schema: dict[str, Any] = json_schema()
    described = [schema, *(d for d in schema["$defs"].values() if "properties" in d)]
    assert all("description" in value or "$ref" in value for d in described for value in d["properties"].values())


def test_every_whole_number_has_bounds() -> None:
    pending: list[Any] = [json_schema()]
    unbounded, found = [], 0
    while pending:
        node = pending.pop()
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else []
        if isinstance(node, dict) and node.get("type") == "integer":
            found += 1
            unbounded += [node] if not {"minimum", "maximum"} <= node.keys() else []
    assert found > 25
    assert unbounded == []
