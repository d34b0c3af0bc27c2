"""An export is loaded by transformers alone, which finds the package by `auto_map`, or says how to install it."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignvlm.exports import CLASSES, CLASSES_FILE, save_export
from alignvlm.model import (
    AlignVLMForConditionalGeneration,
    AlignVLMImageProcessor,
    AlignVLMModel,
    AlignVLMProcessor,
)
from alignvlm.parts import module_name, part_of, public_name
from tests.tiny import picture, tiny_model

LOAD = """
import importlib.abc, sys, torch
import transformers

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "alignvlm":
            raise ModuleNotFoundError("No module named 'alignvlm'")

missing = Missing()
sys.meta_path.insert(0, missing)
for kind in ("AutoConfig", "AutoProcessor", "AutoModel"):
    try:
        getattr(transformers, kind).from_pretrained(sys.argv[1], trust_remote_code=True)
    except ImportError as error:
        print(kind, "pip install alignvlm" in str(error))
sys.meta_path.remove(missing)
for kind in sys.argv[2:]:
    print(kind, type(getattr(transformers, kind).from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
pipe = transformers.pipeline("image-text-to-text", model=sys.argv[1], trust_remote_code=True)
print("pipeline", type(pipe.model).__name__, type(pipe.processor).__name__)
config = transformers.AutoConfig.from_pretrained(sys.argv[1])
config.save_pretrained(sys.argv[1] + "-config")  # the files of a folder are these also where they came from one
code = open(sys.argv[1] + "/README.md").read().split("```python")[1].split("```")[0]
exec(code.replace('"."', "sys.argv[1]"))
"""


def test_transformers_finds_the_classes_without_an_import(tmp_path: Path) -> None:
    model, processor = tiny_model()
    model.generation_config.max_new_tokens = 3
    folder = tmp_path / "runs" / "letters" / "2-joint" / "export"
    save_export(model, model.state_dict(), processor, folder)
    card = (folder / "README.md").read_text()
    assert "# letters\n" in card
    assert f"{model.num_parameters():,} parameters" in card
    picture(40, 30).save(tmp_path / "page.png")
    process = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), *CLASSES], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    said = process.stdout.splitlines()
    assert said[:3] == ["AutoConfig True", "AutoProcessor True", "AutoModel True"]
    assert said[3 : 3 + len(CLASSES)] == [f"{kind} {name}" for kind, name in CLASSES.items()]
    assert said[3 + len(CLASSES)] == f"pipeline {CLASSES['AutoModelForImageTextToText']} {CLASSES['AutoProcessor']}"
    files = {path.name for path in Path(f"{folder}-config").iterdir()}
    assert files == {"config.json", CLASSES_FILE}


def test_every_folder_names_the_package(tmp_path: Path) -> None:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "processor")
    files = {"model": ("config.json", "AutoModel"), "processor": ("processor_config.json", "AutoProcessor")}
    for folder, (file, kind) in files.items():
        found = json.loads((tmp_path / folder / file).read_text())["auto_map"]
        assert found[kind] == f"alignvlm_classes.{CLASSES[kind]}"
        assert (tmp_path / folder / CLASSES_FILE).is_file()
    for each in (AlignVLMForConditionalGeneration, AlignVLMProcessor, type(model.config)):
        each.register_for_auto_class()
        assert each._auto_class is None  # else the next save would hold a copy of its source


GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}


def test_a_machine_with_torchvision_loads_the_image_processor_without_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.auto import image_processing_auto as auto

    tiny_model()[1].save_pretrained(tmp_path)
    monkeypatch.setattr(auto, "is_torchvision_available", lambda: True)
    monkeypatch.setattr(auto.logger, "propagate", True)
    assert type(auto.AutoImageProcessor.from_pretrained(tmp_path)) is AlignVLMImageProcessor
    assert "backend" not in caplog.text


@pytest.mark.parametrize("text", [{}, {"tie_word_embeddings": False}, GPT2 | {"tie_word_embeddings": True}])
def test_weights_under_public_names_load_as_in_earlier_versions(text: dict[str, Any], tmp_path: Path) -> None:
    """The decoder's were `language.` and the language model's own word for it."""
    model, _ = tiny_model(text=text)
    model.save_pretrained(tmp_path)
    word = "transformer" if text.get("model_type") == "gpt2" else "model"
    weights = {
        re.sub(r"^language\.model\.", f"language.{word}.", public_name(name)): tensor.clone()
        for name, tensor in model.state_dict().items()
    }
    assert {name.partition(".")[0] for name in weights} == {"vision", "connector", "language"}
    assert {module_name(name) for name in weights} == model.state_dict().keys()
    assert all(public_name(name) == name for name in weights)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    whole, base = (kind.from_pretrained(tmp_path) for kind in (AlignVLMForConditionalGeneration, AlignVLMModel))
    filled = AlignVLMForConditionalGeneration(model.config)
    filled.load_state_dict(weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole.get_parameter(name), tensor), name
        assert torch.equal(filled.get_parameter(name), tensor), name
        if name.startswith("model."):
            assert torch.equal(base.get_parameter(name.removeprefix("model.")), tensor), name
    whole.save_pretrained(tmp_path / "again")
    kept = load_file(tmp_path / "again" / "model.safetensors").keys()
    assert kept == model.state_dict().keys() - ({"lm_head.weight"} if model.config.tie_word_embeddings else set())


def test_a_name_belongs_to_one_part() -> None:
    model, _ = tiny_model(text={"tie_word_embeddings": False})
    names = [name for name, _ in model.named_parameters()]
    parts = {part: [name for name in names if part_of(name) == part] for part in ("vision", "connector", "language")}
    assert sorted(itertools.chain(*parts.values())) == sorted(names)
    for part in parts:
        assert len(parts[part]) == len(list(model.model.part(part).parameters())) + (part == "language")
    assert public_name("lm_head.weight") == "language.lm_head.weight"
