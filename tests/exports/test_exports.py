"""Exports: complete or not there, with the mode of any new file, and damage to them is one line with the way out."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import PrefixChange

from alignvlm.errors import UserError
from alignvlm.exports import check_export, save_export
from alignvlm.model import AlignVLMForConditionalGeneration, AlignVLMProcessor
from alignvlm.parts import public_name
from data_pipeline.errors import DataError
from tests.fixtures.command import Command
from tests.fixtures.damage import DAMAGES, full_disk
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a stage, written by somebody who lets nobody else read."""
    folder = tmp_path_factory.mktemp("runs") / "tiny" / "1-connector" / "export"
    model, processor = tiny_model()
    old = os.umask(0o027)
    try:
        save_export(model, model.state_dict(), processor, folder)
    finally:
        os.umask(old)
    return folder


@pytest.fixture
def export(written: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    folder = tmp_path / "runs" / "tiny" / "1-connector" / "export"
    shutil.copytree(written, folder)
    return folder


def test_all_files_follow_the_umask(written: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in written.iterdir()} == {0o640}
    assert os.listdir(written.parent) == ["export"]
    check_export(written)


def problem(export: Path) -> str:
    """The one line about an export."""
    with pytest.raises((DataError, UserError)) as caught:
        check_export(export)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("damage", [*DAMAGES, "missing"])
def test_a_damaged_export_names_the_file_and_the_stage(export: Path, damage: str) -> None:
    for path in sorted(export.glob("*.json")) + sorted(export.glob("*.safetensors")):
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage in ("wrong types", "NULs in the middle") and path.suffix == ".safetensors":
            continue  # the numbers have no checksum
        else:
            path.write_bytes(DAMAGES[damage](whole))
        if path.name == "config.json" or not damage.startswith(("other", "wrong")):
            if path.name == "generation_config.json" and damage == "missing":
                continue  # transformers derives it
            message = problem(export)
            if path.name != "config.json":
                assert message.startswith(f"{path} cannot be read (")
                assert message.endswith(
                    f"; remove {export} and start the run again, which takes stage connector again from its last "
                    "checkpoint"
                )
        path.write_bytes(whole)
    check_export(export)


def test_every_cut_of_the_weights_is_seen(export: Path) -> None:
    weights = export / "model.safetensors"
    whole = weights.read_bytes()
    for size in [*range(0, 2000, 7), *range(2000, len(whole), len(whole) // 50), len(whole) - 1]:
        weights.write_bytes(whole[:size])
        assert "model.safetensors" in problem(export)
    weights.write_bytes(whole + b"\0")
    assert f"it has {len(whole) + 1:,} bytes and should have {len(whole):,}" in problem(export)


def test_weights_in_several_files_are_all_looked_at(export: Path) -> None:
    (export / "model.safetensors").unlink()
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    for tensor, name in names.items():
        save_file({tensor: torch.zeros(3)}, export / name)
    index = export / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    check_export(export)
    (export / "model-2.safetensors").unlink()
    assert "model-2.safetensors cannot be read (No such file or directory)" in problem(export)
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    assert "does not name the files" in problem(export)


def test_other_models_and_other_places(export: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(export, elsewhere)
    (elsewhere / "tokenizer.json").unlink()
    assert problem(elsewhere).endswith("copy the export again")
    (elsewhere / "config.json").write_text('{"model_type": "llama"}')
    assert "holds a model of type 'llama'" in problem(elsewhere)
    first = tmp_path / "0-init" / "export"
    shutil.copytree(export, first)
    (first / "model.safetensors").unlink()
    assert problem(first).endswith("start the run again, which builds the first model again")


def test_commands_say_it_in_one_line(export: Path, command: Command) -> None:
    (export / "model.safetensors").write_bytes(b"")
    for words in (("chat", export, "--question", "x"), ("analyze", "vocab", export, "--data", export)):
        message = command(*words, code=2)
        assert message.count("\n") == 1
        assert "takes stage connector again" in message


def test_a_full_disk_leaves_no_half_export(tmp_path: Path) -> None:
    model, processor = tiny_model()
    with full_disk(20_000), pytest.raises(DataError, match=r"export cannot be written .* free some space"):
        save_export(model, model.state_dict(), processor, tmp_path / "export")
    assert os.listdir(tmp_path) == []


def test_weights_have_the_models_own_names_and_the_former_ones_load(export: Path) -> None:
    file = export / "model.safetensors"
    weights, model = load_file(file), AlignVLMForConditionalGeneration.from_pretrained(export)
    assert weights.keys() <= model.state_dict().keys()
    model._weight_conversions = [PrefixChange(prefix_to_remove="vision_model", model_prefix="model.vision_tower")]
    save_export(model, model.state_dict(), AlignVLMProcessor.from_pretrained(export), export.with_name("again"))
    assert load_file(export.with_name("again") / file.name).keys() == weights.keys()
    former = {re.sub(r"^vision\.", "vision.vision_model.", public_name(name)): each for name, each in weights.items()}
    assert not former.keys() & weights.keys()
    save_file(former, file, {"format": "pt"})
    loaded = AlignVLMForConditionalGeneration.from_pretrained(export).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
