"""What other servers load by entry points is there under its names, and needs none of them to be imported."""

from __future__ import annotations

import tomllib
from importlib import import_module

import pytest
import torch

from alignvlm.model import AlignVLMForConditionalGeneration
from alignvlm.serving.plugins import ARCHITECTURE
from tests.checkout import ROOT
from tests.tiny import tiny_model


@pytest.mark.parametrize("group", ["vllm.general_plugins", "sglang.srt.plugins"])
def test_entry_points_name_functions(group: str) -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, name = points[group]["alignvlm"].partition(":")
    assert callable(getattr(import_module(module), name))


def test_the_architecture_is_the_one_of_an_export() -> None:
    model, _ = tiny_model()
    assert ARCHITECTURE == AlignVLMForConditionalGeneration.__name__ == type(model).__name__


def test_a_process_that_looks_up_some_rows_only_gives_the_connector_all_of_them() -> None:
    """What vLLM's tensor parallelism leaves: a part of the rows to look up, and all of them, padded, gathered once."""
    model, _ = tiny_model()
    tiles = torch.randint(0, 255, (2, 3, 32, 32), dtype=torch.uint8)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        expected = model.get_image_features(tiles).pooler_output
        rows = embedding.weight.detach()
        model.model.gathered_embedding = torch.cat([rows, torch.full_like(rows[:7], 9.0)])
        embedding.weight = torch.nn.Parameter(rows[:100])
        assert torch.equal(model.get_image_features(tiles).pooler_output, expected)
