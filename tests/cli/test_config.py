"""`alignvlm config`."""

from __future__ import annotations

import yaml

from tests.fixtures.command import Command


def test_show_prints_the_resolved_recipe(command: Command) -> None:
    shown = yaml.safe_load(command("config", "show", "paper_llama32_3b", "seed=5"))
    assert shown["seed"] == 5
    assert shown["extends"] is None
    assert shown["model"]["vision"]["config"]["hidden_size"] == 1152


def test_list_names_recipes_and_strategies(command: Command) -> None:
    out = command("config", "list")
    assert "paper_llama31_8b" in out
    assert "zero3_offload" in out


def test_check_says_ok_or_what_is_wrong(command: Command) -> None:
    assert "OK" in command("config", "check", "quickstart")
    assert "zero9" in command("config", "check", "quickstart", "train.deepspeed=zero9", code=2)
