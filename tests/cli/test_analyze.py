"""`alignvlm analyze vocab`: the export it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor
from data_pipeline.shards.writer import write_shards
from tests.fixtures.command import Command
from tests.tiny import conversation, picture, tiny_model


def test_command_writes_an_export_that_loads(tmp_path: Path, command: Command) -> None:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "export")
    processor.save_pretrained(tmp_path / "export")
    records = (
        {"key": f"{i:03}", "messages": conversation("read", "12", 1), "images": [picture(32, 32, seed=i)]}
        for i in range(6)
    )
    write_shards(records, tmp_path / "source", source="s")
    arguments = ("analyze", "vocab", tmp_path / "export", "--data", tmp_path / "source", "--images", "4")
    said = command(*arguments, "--keep-mass", "0.95", "--device", "cpu")
    assert "analyse images: 4/4" in said
    assert "over 4 images" in said
    folder = tmp_path / "export-active"
    loaded = AlignVLMForConditionalGeneration.from_pretrained(folder)
    num_active = json.loads((folder / "vocabulary.json").read_text())["num_active"]
    assert loaded.model.connector.w2.shape[0] == num_active < len(processor.tokenizer)
    model.model.connector.keep_tokens(loaded.model.connector.active_ids)
    tiles = torch.from_numpy(AlignVLMProcessor.from_pretrained(folder).spec.cut(picture(32, 32)))
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.get_image_features(tiles).pooler_output, model.get_image_features(tiles).pooler_output
        )
    assert "already exists" in command(*arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--keep-mass", "1.5"], "--keep-mass 1.5"), (["--images", "0"], "--images 0"), ([], "no config.json")],
)
def test_mistakes_are_named(arguments: list[str], message: str, command: Command, tmp_path: Path) -> None:
    assert message in command("analyze", "vocab", tmp_path / "none", "--data", tmp_path, *arguments, code=2)
