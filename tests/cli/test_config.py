"""`alignvlm config`."""

from __future__ import annotations

import argparse

import pytest
import yaml

from alignvlm.cli import config
from alignvlm.errors import UserError


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    config.add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["config", *arguments])
    return parsed.handler(parsed)


def test_show_prints_the_resolved_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("show", "paper_llama32_3b", "seed=5") == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["seed"] == 5
    assert shown["extends"] is None
    assert shown["model"]["vision"]["config"]["hidden_size"] == 1152


def test_list_names_recipes_and_strategies(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    out = capsys.readouterr().out
    assert "paper_llama31_8b" in out
    assert "zero3_offload" in out


def test_check_says_ok_or_raises(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("check", "quickstart") == 0
    assert "OK" in capsys.readouterr().out
    with pytest.raises(UserError, match="zero9"):
        run("check", "quickstart", "train.deepspeed=zero9")
