"""The tokenizer that a recipe trains: kept, trained anew when its data changed or its files are damaged."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from alignvlm import stage_data
from alignvlm.config import load_recipe
from alignvlm.config.schema import Recipe
from alignvlm.model.build import load_processor, tokenizer_folder
from data_pipeline.errors import DataError
from data_pipeline.shards.writer import write_shards
from tests.fixtures.damage import DAMAGES
from tests.tiny import WORDS

RECIPE = """
name: tiny
model:
  vision: {config: {model_type: siglip_vision_model, image_size: 32, patch_size: 8}}
  language: {config: {model_type: llama}, tokenizer: {vocab_size: 320}}
data: {root: ROOT, sources: {read: {path: read}}}
stages: {connector: {mixture: {read: 1}, lr: {default: 1e-3}}}
train: {precision: fp32}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    messages = [{"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": WORDS[1]}]
    write_shards([{"key": "k", "messages": messages}], tmp_path / "data" / "read", num_processes=1)
    (tmp_path / "tiny.yaml").write_text(RECIPE.replace("ROOT", str(tmp_path / "data")))
    return load_recipe(str(tmp_path / "tiny.yaml"))


def trained(caplog: pytest.LogCaptureFixture, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """How often `ensure_processor` trains a tokenizer, and how many warnings it gives."""
    from alignvlm.model import tokenizer

    calls: list[int] = []
    train = tokenizer.train_tokenizer
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        caplog.clear()
        patch.setattr(tokenizer, "train_tokenizer", lambda *a: calls.append(1) or train(*a))  # type: ignore[func-returns-value]
        stage_data.ensure_processor(recipe)
    return len(calls), len(caplog.messages)


def test_a_damaged_tokenizer_is_trained_anew(
    recipe: Recipe, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained(caplog, recipe, monkeypatch) == (1, 0)
    assert trained(caplog, recipe, monkeypatch) == (0, 0)
    folder = tokenizer_folder(recipe)
    first = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in first:
        for damage in ("cut", "empty", "garbage", "a list", "missing"):
            if damage == "missing":
                (folder / name).unlink()
            else:
                (folder / name).write_bytes(DAMAGES[damage](first[name]))
            warnings = int((name, damage) != (stage_data.MADE_FROM, "missing"))
            assert trained(caplog, recipe, monkeypatch) == (1, warnings), (name, damage)
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == first
    assert trained(caplog, recipe, monkeypatch) == (0, 0)


def test_a_tokenizer_of_other_data_is_trained_anew_in_silence(
    recipe: Recipe, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage_data.ensure_processor(recipe)
    source = Path(recipe.data.sources["read"].folder)
    shutil.rmtree(source)
    messages = [{"role": "user", "content": WORDS[2]}, {"role": "assistant", "content": WORDS[1]}]
    write_shards([{"key": "k", "messages": messages}], source, num_processes=1)
    assert trained(caplog, recipe, monkeypatch) == (1, 0)


def test_estimating_with_a_damaged_tokenizer_is_one_line(recipe: Recipe) -> None:
    stage_data.ensure_processor(recipe)
    (tokenizer_folder(recipe) / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot be read .* trains it anew") as caught:
        load_processor(recipe)
    assert "\n" not in str(caught.value)
