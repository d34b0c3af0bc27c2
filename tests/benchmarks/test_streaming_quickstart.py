"""`benchmarks/streaming/quickstart.py`: its short recipe is the quickstart's, and its runs end with the same losses."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import pytest

from alignvlm.config import load_recipe


def test_the_short_recipe_is_the_quickstarts(benchmark_module: Any) -> None:
    module = benchmark_module("quickstart")
    recipe = load_recipe("quickstart", module.recipe(40, 3))
    assert {name: stage.max_steps for name, stage in recipe.stages.items()} == {"connector": 3, "joint": 3}
    assert {name for stage in recipe.stages.values() for name in stage.mixture} == set(module.SOURCES)
    assert {recipe.data.sources[name].generator_args["num_samples"] for name in module.SOURCES} == {40}
    rows = [{"step": 1, "data_wait": 5.0, "seconds": 9.0}, {"step": 2, "data_wait": 0.5, "seconds": 2.0}]
    assert module.waited(rows) == 0.25


@pytest.mark.faults
def test_losses_from_s3_and_through_an_outage_are_those_from_disk(benchmark_module: Any) -> None:
    with patch.dict(os.environ):
        found = benchmark_module("quickstart").measure(samples=200, steps=30, outage=20, kind="seaweed")
    assert (found["steps"], found["same_far"], found["same_outage"]) == (60, True, True)
    assert found["longest_step"] > 5
