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
    from alignvlm.model.inputs import tokenizer

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


def test_the_held_out_packs_are_the_same_for_any_number_of_ranks(recipe: Recipe, tmp_path: Path) -> None:
    turns = [[{"role": "user", "content": f"{n} {WORDS[n % 3]}"}, {"role": "assistant", "content": "x" * (1 + n)}]
             for n in range(11)]  # fmt: skip
    write_shards(({"key": f"k{n}", "messages": t} for n, t in enumerate(turns)), tmp_path / "data" / "held")
    file = tmp_path / "tiny.yaml"
    file.write_text(file.read_text().replace("{read: {path: read}}", "{read: {path: read}, held: {path: held}}"))
    changes = ["evaluation.loss={sources: [held], max_packs: 5}", "data.num_workers=0"]
    recipe = load_recipe(str(file), [*changes, "stages.connector.sequence_length=64"])
    stage = recipe.stages["connector"]
    processor = stage_data.prepare(recipe)
    packs = {
        (rank, size): stage_data.held_out_packs(recipe, stage, processor, rank=rank, world_size=size)
        for size in (1, 2, 3)
        for rank in range(size)
    }
    alone = [(pack.keys, pack.input_ids.tolist()) for pack in packs[0, 1].mine]
    assert len(alone) == len(packs[0, 1].source_of) > 3
    for size in (2, 3):
        each = [[(pack.keys, pack.input_ids.tolist()) for pack in packs[rank, size].mine] for rank in range(size)]
        dealt = [each[number % size][number // size] for number in range(len(alone))]
        assert dealt == alone
        assert len({len(mine) for mine in each}) == 1  # as many forward passes; behind the last pack without documents
        assert all(not keys for mine in each for keys, _ in mine[len(alone) // size + 1 :])
