"""A zoo of bad samples: each is left out and named, by the same reason wherever it is met, and ends nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignvlm import stage_data
from alignvlm.config import load_recipe
from alignvlm.config.schema import Recipe
from alignvlm.evaluation.evaluate import evaluate
from alignvlm.evaluation.items import Item
from data_pipeline.files import read_json_lines
from data_pipeline.loading.ledger import Ledger
from data_pipeline.shards.index import index_shards
from data_pipeline.shards.reader import SourceReader
from tests.data_pipeline.tars import overwrite, picture, write_tar
from tests.fixtures.command import Command

RECIPE = """
name: zoo
model:
  vision:
    config: {model_type: siglip_vision_model, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
             num_attention_heads: 2, image_size: 64, patch_size: 16}
  language:
    tokenizer: {vocab_size: 320}
    config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
             num_attention_heads: 4, num_key_value_heads: 2}
    chat_template: >-
      {% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif
      %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor
      %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
  connector: {kind: align}
  tiles: {max_tiles: 1, overview: false, merge: 2}
data: {root: ROOT, num_workers: 0, sources: {zoo: {}, heldout: {}}}
train: {deepspeed: cpu_zero3, precision: fp32}
stages:
  only: {mixture: {zoo: 1}, global_batch_packs: 1, sequence_length: 512, max_text_tokens: 100, lr: {default: 1.0e-3}}
evaluation:
  gallery: 0
  batch_size: 4
  tasks: {heldout: {}}
"""


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


GOOD: dict[str, Any] = {
    **{f"good{i}": {"messages": [user(f"number {i}"), assistant(str(i))]} for i in range(6)},
    "image": {"messages": [user("<image> read"), assistant("red")]},
    "spells": {"messages": [user([{"type": "text", "text": "<image> <|im_end|>"}]), assistant("<|im_start|>")]},
    "nul": {"messages": [user("a\x00b"), assistant("\x00")]},
    "llava": {"conversations": [{"from": "human", "value": "<image>\nread"}, {"from": "gpt", "value": "red"}]},
    "silent": {"messages": [user("say nothing"), assistant("")]},
}
BAD: dict[str, tuple[Any, str]] = {
    "no-prompt": ({"messages": [assistant("hello")]}, "the assistant has the first turn"),
    "no-answer": ({"messages": [user("hello")]}, "no supervised token"),
    "far-answer": ({"messages": [user("x y " * 99), assistant("hello")]}, "no supervised token"),
    "surrogate": ({"messages": [user("\ud800"), assistant("a")]}, "lone surrogate U+D800"),
    "surrogate-answer": (
        {"messages": [user("a"), assistant([{"type": "text", "text": "\udfff"}])]},
        "surrogate U+DFFF",
    ),
    "surrogate-role": ({"messages": [{"role": "\ud800", "content": "a"}]}, "role '\\ud800' is none of"),
    "surrogate-caption": ({"caption": "\ud800"}, "lone surrogate"),
    "tool": ({"messages": [user("a"), {"role": "tool", "content": "b"}, assistant("c")]}, "no tools here"),
    "marks": ({"messages": [user("<image><image>"), assistant("a")]}, "2 image placeholder(s)"),
    "no-mark": ({"messages": [user("hm"), assistant("a")]}, "0 image placeholder(s)"),
    "speaker": ({"conversations": [{"from": ["gpt"], "value": "a"}]}, "turn 0 must be from"),
    "no-turns": ({"conversations": {"from": "gpt"}}, "not a list of turns"),
    "empty": ({"messages": []}, "not a list of messages"),
    "null": ({"messages": [user(None), assistant("a")]}, "content is NoneType"),
    "part": ({"messages": [user([{"type": []}]), assistant("a")]}, "neither an image nor a text"),
    "other": ({"text": "a"}, "nor a question nor a caption"),
    "list": ([], "not a list of turns"),
    "cut-image": ({"messages": [user("<image>"), assistant("a")]}, "image cannot be decoded"),
    "flipped": ({"messages": [user("a"), assistant("b")]}, "does not match its checksum"),
}
IMAGES = {key: picture() for key in ("image", "llava", "marks", "no-mark", "surrogate-caption")}
IMAGES["cut-image"] = picture(400, 400)[:900]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `zoo.yaml` and the zoo as indexed shards, to train on and to evaluate on."""
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "zoo.yaml").write_text(RECIPE.replace("ROOT", str(folder / "data")))
    members = []
    for key, row in (GOOD | {key: row for key, (row, _) in BAD.items()}).items():
        members.append((f"{key}.json", json.dumps(row).encode()))
        members += [(f"{key}.0.jpg", IMAGES[key])] if key in IMAGES else []
    half = len(members) // 2
    _write(folder / "data" / "zoo", [members[:half], members[half:]])
    _write(folder / "data" / "heldout", [members])
    return folder


def _write(folder: Path, shards: list[list[tuple[str, bytes]]]) -> None:
    for number, members in enumerate(shards):
        write_tar(folder / f"{number}.tar", members)
    index_shards(folder, num_processes=1)
    reader = SourceReader(folder)
    entry = next(e for e in map(reader.entry, range(len(reader))) if e.key == "flipped")
    overwrite(folder / entry.shard, entry.members["json"][0] + 2, b"#")


@pytest.fixture(scope="module")
def recipe(zoo: Path) -> Recipe:
    return load_recipe(str(zoo / "zoo.yaml"))


@pytest.fixture(scope="module")
def left_out(zoo: Path, recipe: Recipe) -> dict[str, str]:
    """Key and reason of what measuring and the loader leave out, from the quarantine ledger."""
    stage = stage_data.find_stage(recipe)
    processor = stage_data.prepare(recipe)
    plan = stage_data.stage_plan(recipe, stage, processor)
    ledger = Ledger(zoo / "quarantine.jsonl", max_bad_fraction=1.0)
    keys = [
        key.rpartition("/")[2]
        for step in stage_data.stage_loader(recipe, stage, plan, processor, ledger=ledger)
        for batch in step
        for key in batch.keys
    ]
    assert sorted(keys) == sorted(GOOD)
    return {row["key"]: row["error"] for row in read_json_lines(zoo / "quarantine.jsonl")}


def test_training_leaves_out_the_bad_ones_and_no_other(left_out: dict[str, str]) -> None:
    assert left_out.keys() == BAD.keys()
    assert {key: error for key, error in left_out.items() if BAD[key][1] not in error} == {}
    assert all(len(error.splitlines()) == 1 for error in left_out.values())


def test_verify_names_what_training_leaves_out(zoo: Path, left_out: dict[str, str], command: Command) -> None:
    printed = command("data", "verify", zoo / "data" / "zoo", "--recipe", zoo / "zoo.yaml", code=1)
    assert dict(re.findall(r"^  \d\.tar: sample (\S+): (.*)$", printed, re.MULTILINE)) == left_out
    assert f"zoo: {len(left_out)} problem(s)" in printed


def test_a_batch_with_bad_samples_can_be_drawn(recipe: Recipe, left_out: dict[str, str]) -> None:
    page = stage_data.batch_page(recipe, stage_data.find_stage(recipe), 0, 9)
    assert "image cannot be decoded" in page


class Asker:
    """Prepares the inputs as a model would, and answers nothing."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def prepare(self, items: Sequence[Item]) -> int:
        self.processor.prepare_generation([i.messages for i in items], [i.images for i in items])
        return len(items)

    def generate(self, count: int, max_new_tokens: int, until: Sequence[str] = ()) -> list[str]:
        return [""] * count

    def vocabulary_view(self, item: Item) -> None:
        return None


def test_an_evaluation_counts_and_names_them(
    zoo: Path, recipe: Recipe, left_out: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    answerer = Asker(stage_data.ensure_processor(recipe))
    entry = evaluate(zoo / "model", recipe, zoo / "evaluation", answerer=answerer)["tasks"]["heldout"]
    asked = {row["key"] for row in read_json_lines(zoo / "evaluation" / "heldout.jsonl")}
    named = {row["key"]: row["error"] for row in read_json_lines(zoo / "evaluation" / "heldout.unusable.jsonl")}
    unusable = BAD.keys() - {"far-answer"}  # which has a question: only training cuts text
    assert asked == GOOD.keys() | {"far-answer"}
    assert named.keys() == unusable
    assert entry["unreadable"] == len(unusable)
    assert f"task heldout: {len(unusable)} items could not be used" in caplog.text
