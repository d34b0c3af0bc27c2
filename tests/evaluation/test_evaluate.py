"""Evaluation of real shards by an answerer without a model: sharding, reuse, multi-turn items, mistakes."""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alignvlm.config import with_names
from alignvlm.config.schema import DataConfig, Recipe, SourceConfig
from alignvlm.config.sections.evaluation import EvaluationConfig, TaskConfig
from alignvlm.errors import UserError
from alignvlm.evaluation.evaluate import _read_part, evaluate
from alignvlm.evaluation.items import Item, items_of, spread
from alignvlm.run_folder import EvaluationFolder
from alignvlm.system.ranks import Ranks
from data_pipeline.errors import DataError
from data_pipeline.files import read_json_lines, read_needed
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.writer import write_shards
from data_pipeline.stores import helper
from tests.evaluation.thread_ranks import ThreadRanks
from tests.fixtures.damage import DAMAGES
from tests.stores.fake_hub import FakeHub

NUM_SAMPLES = 23


class Fake:
    """Right or wrong by the item alone, whoever asks and with whatever else in the batch."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def prepare(self, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def generate(self, items: Sequence[Item], max_new_tokens: int, until: Sequence[str] = ()) -> list[str]:
        self.batches.append(len(items))
        return [
            i.answers[0] if zlib.crc32(f"{i.key}{i.turn}".encode()) % 3 else "wrong"[:max_new_tokens] for i in items
        ]

    def vocabulary_view(self, item: Item) -> dict[str, Any] | None:
        return {"tiles": [], "entropy": 1.0, "vocabulary": 3} if item.images else None


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    write_shards((_record(i) for i in range(NUM_SAMPLES)), tmp_path / "data" / "fields", samples_per_shard=10)
    return with_names(
        Recipe(
            name="demo",
            data=DataConfig(root=str(tmp_path / "data"), sources={"fields_test": SourceConfig(path="fields")}),
            evaluation=EvaluationConfig(tasks={"fields": TaskConfig(source="fields_test")}, batch_size=4, gallery=5),
        )
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def _record(i: int) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "<image>First?"},
        {"role": "assistant", "content": f"{i}"},
        {"role": "user", "content": [{"type": "text", "text": "Second?"}] + [{"type": "image"}] * (i % 2)},
        {"role": "assistant", "content": f"{i + 1}"},
    ]
    if i % 3 == 0:
        messages = messages[:2]
    images = [Image.new("RGB", (20 + i, 30), (i, i, i))] * (1 + (i % 2 if i % 3 else 0))
    return {"key": f"k{i:03d}", "messages": messages, "images": images, "answers": [messages[-1]["content"], "also"]}


def test_ranks_together_give_what_one_process_gives(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    one = Fake()
    alone = evaluate(model, recipe, tmp_path / "one", answerer=one)
    fakes = [Fake() for _ in range(3)]
    three = ThreadRanks(3).run(
        lambda ranks: evaluate(model, recipe, tmp_path / "three", answerer=fakes[ranks.rank], ranks=ranks)
    )
    assert [_without_time(results) for results in three] == [_without_time(alone)] * 3
    assert sorted(size for fake in fakes for size in fake.batches) == sorted(one.batches)
    assert min(len(fake.batches) for fake in fakes) > 2
    assert (tmp_path / "three" / "fields.jsonl").read_bytes() == (tmp_path / "one" / "fields.jsonl").read_bytes()
    assert _files(tmp_path / "three") == _files(tmp_path / "one")


def test_rank_0_sees_for_all_what_is_done(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    """The other rank sees neither the model nor the results yet, as a host may on a network file system."""
    alone = evaluate(model, recipe, tmp_path / "out", answerer=Fake())

    def work(ranks: Ranks) -> dict[str, Any]:
        seen = (model, tmp_path / "out") if ranks.is_main else (tmp_path / "none", tmp_path / "nowhere")
        return evaluate(seen[0], recipe, seen[1], answerer=None, ranks=ranks)

    assert ThreadRanks(2).run(work) == [alone, alone]


def test_predictions_are_in_order_and_scores_are_their_means(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    entry = evaluate(model, recipe, tmp_path / "out", answerer=Fake())["tasks"]["fields"]
    rows = read_json_lines(tmp_path / "out" / "fields.jsonl")
    two_turns = [i for i in range(NUM_SAMPLES) if i % 3]
    assert [(r["index"], r["turn"]) for r in rows] == sorted(
        [(i, 0) for i in range(NUM_SAMPLES)] + [(i, 1) for i in two_turns]
    )
    assert {"key", "task", "question", "answers", "prediction", "exact_match", "anls", "relaxed_accuracy"} <= set(
        rows[0]
    )
    assert entry["items"] == len(rows)
    assert entry["exact_match"] == pytest.approx(sum(r["exact_match"] for r in rows) / len(rows))
    assert 0 < entry["exact_match"] < 1
    assert entry["baseline_answer"] == "also"
    with_images = [r["index"] for r in rows if "images" in r and r["turn"] == 0]
    assert with_images == spread(NUM_SAMPLES, 5)
    for row in rows:
        for name in row.get("images", []):
            with Image.open(tmp_path / "out" / name) as image:
                assert image.size == (20 + row["index"], 30)


def test_results_of_the_same_model_are_reused(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = evaluate(model, recipe, out, answerer=Fake())
    again = Fake()
    assert evaluate(model, recipe, out, answerer=again) == first
    assert again.batches == []
    (model / "config.json").write_text('{"other": 1}')
    assert _without_time(evaluate(model, recipe, out, answerer=again)) != _without_time(first)
    assert sum(again.batches) == first["tasks"]["fields"]["items"]


@pytest.mark.parametrize("damage", [*DAMAGES, "no items", "a missing score"])
def test_damaged_results_are_evaluated_again(
    recipe: Recipe, model: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = evaluate(model, recipe, tmp_path, answerer=Fake(), limit=2)
    path = tmp_path / "results.json"
    if damage == "no items":
        path.write_text(path.read_text().replace('"items"', '"item"'))
    elif damage == "a missing score":
        path.write_text(path.read_text().replace('"anls": 0', '"anlz": 0').replace('"anls": 1', '"anlz": 1'))
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert _without_time(evaluate(model, recipe, tmp_path, answerer=Fake(), limit=2)) == _without_time(first)
    assert [str(path) in message for message in caplog.messages] == [True]


def test_a_folder_that_cannot_be_written_is_said_before_anything_is_answered(
    recipe: Recipe, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    fake = Fake()
    with pytest.raises(DataError, match=r"cannot be written \(Not a directory\); .* --output FOLDER"):
        evaluate(model, recipe, tmp_path / "file" / "out", answerer=fake)
    assert fake.batches == []


def test_a_part_that_was_cut_is_never_joined(tmp_path: Path) -> None:
    part = tmp_path / "fields.0-of-1.jsonl"
    for content in ("", '{"index": 0}\n', '{"index": 0}\n{"sec'):
        part.write_text(content)
        with pytest.raises(DataError, match="evaluate again"):
            read_needed(part, _read_part, "evaluate again")


def test_another_choice_of_metrics_is_evaluated_again(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    first = evaluate(model, recipe, tmp_path / "out", answerer=Fake())["tasks"]["fields"]
    other = evaluate(model, _with_metrics(recipe, ["anls"]), tmp_path / "out", answerer=Fake())["tasks"]["fields"]
    assert list(other["metrics"]) == ["anls"]
    assert (other["anls"], other["baseline"]) == (first["anls"], first["baseline_anls"])
    assert "exact_match" not in other
    assert "exact_match" not in read_json_lines(tmp_path / "out" / "fields.jsonl")[0]


def test_limits_and_batches(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    fake = Fake()
    entry = evaluate(model, recipe, tmp_path / "out", answerer=fake, limit=3)["tasks"]["fields"]
    assert entry["items"] == 5
    assert fake.batches == [4, 1]
    task = TaskConfig(name="fields", source="fields_test", limit=1)
    short = replace(recipe, evaluation=replace(recipe.evaluation, tasks={"fields": task}))
    assert evaluate(model, short, tmp_path / "out", answerer=fake)["tasks"]["fields"]["items"] == 1


def test_a_sample_that_cannot_be_read_is_counted(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    shard = next((tmp_path / "data" / "fields").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    at = data.index(b"IDAT")
    data[at + 6 : at + 12] = b"broken"
    shard.write_bytes(bytes(data))
    entry = evaluate(model, recipe, tmp_path / "out", answerer=Fake())["tasks"]["fields"]
    assert entry["unreadable"] == 1
    assert entry["items"] == NUM_SAMPLES + sum(1 for i in range(NUM_SAMPLES) if i % 3) - 1


def test_each_turn_is_asked_with_the_true_history(recipe: Recipe, tmp_path: Path) -> None:
    sample = SourceReader(tmp_path / "data" / "fields", "fields_test")[1]
    first, second = items_of(sample)
    assert [m["role"] for m in first.messages] == ["user"]
    assert [m["role"] for m in second.messages] == ["user", "assistant", "user"]
    assert (first.question, second.question) == ("First?", "Second?")
    assert (len(first.images), len(second.images)) == (1, 2)
    assert first.answers == ["1"]
    assert second.answers == ["2", "also"]
    per_turn = replace(sample, meta={"answers": [["1", "one"], ["2", "two"]]})
    assert [item.answers for item in items_of(per_turn)] == [["1", "one"], ["2", "two"]]


def test_mistakes_are_named(recipe: Recipe, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'feilds': did you mean 'fields'"):
        evaluate(model, recipe, tmp_path / "out", tasks=["feilds"], answerer=Fake())
    with pytest.raises(UserError, match="not an export folder"):
        evaluate(tmp_path, recipe, tmp_path / "out")
    with pytest.raises(UserError, match=r"unknown metric 'anl': did you mean 'anls'\? "):
        evaluate(tmp_path / "never loaded", _with_metrics(recipe, ["anl"]), tmp_path / "out")


def test_spread_covers_the_whole_source() -> None:
    assert spread(100, 4) == [0, 25, 50, 75]
    assert spread(3, 12) == [0, 1, 2]
    assert spread(0, 12) == []


def _with_metrics(recipe: Recipe, names: list[str]) -> Recipe:
    task = replace(recipe.evaluation.tasks["fields"], metrics=names)
    return replace(recipe, evaluation=replace(recipe.evaluation, tasks={"fields": task}))


def _without_time(results: dict[str, Any]) -> dict[str, Any]:
    copy = json.loads(json.dumps(results))
    for entry in copy["tasks"].values():
        assert entry.pop("seconds") >= 0
    return copy


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


class OneOfTwo(Ranks):
    """A rank that hears what rank 0 has said; rank 0 says, and writes the part of the other one itself."""

    size = 2

    def __init__(self, heard: list[Any] | None = None) -> None:
        self.rank, self.said, self.heard = int(heard is not None), list[Any](), list(heard or ())

    def broadcast(self, value: Any) -> Any:
        self.said.append(copy.deepcopy(value))
        return self.heard.pop(0) if self.rank else value

    def all_gather(self, value: Any) -> list[Any]:
        return [value]


def test_all_nodes_read_a_branch_of_the_hub_at_the_commit_that_rank_0_saw(
    hub: FakeHub, recipe: Recipe, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data" / "fields"
    first = hub.commit({f"fields/{path.name}": path.read_bytes() for path in folder.iterdir()})
    source = replace(recipe.data.sources["fields_test"], path="hf://datasets/org/name/fields")
    far = with_names(replace(recipe, data=replace(recipe.data, sources={"fields_test": source})))
    main = OneOfTwo()
    with pytest.raises(DataError, match="evaluate again"):  # the other's part is not there
        evaluate(model, far, tmp_path / "out", ranks=main, answerer=Fake())
    hub.commit({"fields/000000.tar": b"another file", "fields/manifest.json": b"{}"})
    hub.log.clear()
    monkeypatch.setenv("ALIGNVLM_CACHE", str(tmp_path / "node-2"))
    helper.stop()
    other = OneOfTwo([*main.said[:3], (None, None), None, (None, None), {}])
    evaluate(model, far, tmp_path / "out", ranks=other, answerer=Fake())
    assert {path.split("/")[5] for _, path in hub.log if "/resolve/" in path} == {first}
    rows = _read_part(EvaluationFolder(tmp_path / "out").part("fields", 1, 2))
    assert {row["index"] for row in rows[:-1]} == {4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22}
