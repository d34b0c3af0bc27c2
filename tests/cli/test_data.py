"""`alignvlm data …` and the glue between recipes and data, with the tiny encoder in place of a processor."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from alignvlm import stage_data
from alignvlm.config import with_names
from alignvlm.config.schema import DataConfig, Recipe, SourceConfig, StageConfig
from alignvlm.config.sections.evaluation import EvaluationConfig, HeldOutLossConfig, TaskConfig
from alignvlm.errors import UserError
from data_pipeline.errors import DataError
from data_pipeline.loading.ledger import Ledger
from data_pipeline.shards.reader import SourceReader
from data_pipeline.shards.writer import write_shards
from tests.fixtures.command import Command


@pytest.fixture
def own_data(tmp_path: Path) -> Path:
    """A JSON-lines file in both spellings, and its images."""
    folder = tmp_path / "own"
    (folder / "images").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (9, 7), "red").save(folder / "images" / name)
    turns = [{"role": "user", "content": "<image><image>which?"}, {"role": "assistant", "content": "both"}]
    llava = [{"from": "human", "value": "<image>\nread"}, {"from": "gpt", "value": "red"}]
    rows = [
        {"messages": turns, "images": ["a.png", "b.png"], "answers": ["both"]},
        {"id": "x.1", "image": "a.png", "conversations": llava},
        {"key": "mine", "messages": turns[1:]},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


class Processor:
    """The letters encoder with what the commands ask of a processor."""

    image_token_id = 1

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.fingerprint, self.tile_size = encoder.fingerprint, encoder.tile_size
        self.measure, self.encode = encoder.measure, encoder.encode
        self.tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))

    def with_text_limit(self, limit: int | None) -> Processor:
        assert limit is None
        return self


@pytest.fixture
def recipe(tmp_path: Path, records: Any) -> Recipe:
    for name, count in (("one", 120), ("two", 40)):
        write_shards(records(count, name), tmp_path / "root" / name, samples_per_shard=20, num_processes=1)
    stage = StageConfig(mixture={"one": 3, "two": 1}, sequence_length=200, global_batch_packs=4)
    return with_names(
        Recipe(
            name="tiny",
            data=DataConfig(
                root=str(tmp_path / "root"),
                sources={name: SourceConfig() for name in ("one", "two", "never")},
                num_workers=0,
            ),
            stages={"first": stage, "second": stage},
            evaluation=EvaluationConfig(tasks={"task": TaskConfig(source="two")}),
        )
    )


@pytest.fixture
def commands(recipe: Recipe, encoder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`load_recipe` and `ensure_processor` give the tiny ones."""
    monkeypatch.setattr("alignvlm.config.load_recipe", lambda name, overrides=(): recipe)
    for module in ("plan", "views"):
        monkeypatch.setattr(f"alignvlm.stage_data.{module}.ensure_processor", lambda recipe: Processor(encoder))


def test_own_data_becomes_shards(own_data: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "shards"
    own = ("--from-jsonl", own_data / "rows.jsonl", "--images", own_data / "images")
    assert "3 samples" in command("data", "write", *own, out)
    reader = SourceReader(out)
    samples = [reader[i] for i in range(3)]
    assert [len(sample.images) for sample in samples] == [2, 1, 0]
    assert samples[0].meta["answers"] == ["both"]
    assert samples[1].messages[0]["content"] == [{"type": "image"}, {"type": "text", "text": "\nread"}]
    assert samples[2].key == "mine"
    assert f"{out}: OK" in command("data", "verify", "--decode", out)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"messages": []', "line 1"),
        ("[]", "not a JSON object"),
        ('{"text": "x"}', "no 'messages'"),
        ('{"messages": [], "images": 5}', "'images' is not a list of file names: 5"),
        ('{"messages": [], "image": "no.png"}', "No such file"),
        ('{"messages": [], "image": "../../etc/passwd"}', "leaves its folder"),
        ('{"messages": [], "image": "no.jpg"}', "image 'no.jpg': image cannot be decoded"),
        ('{"messages": [{"role": "user", "content": "<image>"}]}', "1 image placeholder(s) in the messages but 0"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content is int"),
        ('{"messages": [{"role": "user", "content": "x"}], "key": "a b"}', "key 'a b' does not fit"),
        ('{"conversations": [{"from": "robot", "value": "x"}]}', "must be from"),
    ],
)
def test_mistakes_in_own_data_name_the_line(
    own_data: Path, tmp_path: Path, command: Command, row: str, reason: str
) -> None:
    (own_data / "rows.jsonl").write_text(row + "\n")
    (own_data / "no.jpg").touch()
    message = command("data", "write", "--from-jsonl", own_data / "rows.jsonl", tmp_path / "out", code=2)
    assert reason in message
    assert "rows.jsonl, line 1" in message
    assert not list(tmp_path.glob("out*"))


def test_index_and_verify_folders(recipe: Recipe, command: Command) -> None:
    folder = Path(recipe.data.root) / "one"
    for path in [*folder.glob("*.jsonl"), folder / "manifest.json"]:
        path.unlink()
    assert "120 samples in 6 shards" in command("data", "index", folder)
    command("data", "verify", folder)
    with (folder / "000002.tar").open("r+b") as file:
        file.seek(520)
        file.write(b"damage")
    assert "000002.tar" in command("data", "verify", folder, code=1)


@pytest.mark.usefixtures("commands")
def test_plan_diff_and_show(tmp_path: Path, command: Command) -> None:
    text = command("data", "plan", "tiny", "--world-size", "2")
    assert "stage first:" in text
    assert "weight 75.00%" in text
    assert "2 ranks" in text
    plan = json.loads(command("data", "plan", "tiny", "--json"))
    assert list(plan["stages"]) == ["first", "second"]
    assert plan["stages"]["first"]["order"] != plan["stages"]["second"]["order"]
    saved = tmp_path / "plan.json"
    saved.write_text(json.dumps(plan))
    assert "the plans are the same" in command("data", "diff", saved, "tiny")
    plan["stages"]["first"]["steps"] += 1
    saved.write_text(json.dumps(plan))
    assert "stages.first.steps" in command("data", "diff", saved, "tiny", code=1)
    page = tmp_path / "page.html"
    assert command("data", "show", "tiny", "--step", "1", "--output", page).split()[-1] == str(page)
    html = page.read_text()
    assert "visual tokens" in html
    assert "data:image/png;base64" in html
    assert 'class="s"' in html
    assert "has steps 0 to" in command("data", "show", "tiny", "--step", "9999", code=2)
    assert "no stage 'third'" in command("data", "plan", "tiny", "--stage", "third", code=2)
    assert "not a saved plan" in command("data", "diff", "missing.json", "tiny", code=2)


def test_the_glue_gives_every_stage_its_batches(recipe: Recipe, encoder: Any, tmp_path: Path) -> None:
    processor = Processor(encoder)
    with pytest.raises(DataError, match="not measured"):
        stage_data.stage_plan(recipe, recipe.stages["first"], processor)
    assert [source.name for source in stage_data.used_sources(recipe)] == ["one", "two"]
    for _ in range(2):
        stage_data.ensure_shards(stage_data.used_sources(recipe))
        stage_data.ensure_lengths(recipe, recipe.stages.values(), processor)
    second = stage_data.find_stage(recipe, "second")
    plan = stage_data.stage_plan(recipe, second, processor)
    loader = stage_data.stage_loader(recipe, second, plan, processor, start_step=2, ledger=Ledger(tmp_path / "q.jsonl"))
    steps = list(loader)
    assert len(steps) == plan.num_steps - 2
    assert len(steps[0]) == 4
    with pytest.raises(UserError, match=r"no stage 'secnd': did you mean 'second'\?"):
        stage_data.find_stage(recipe, "secnd")


def test_held_out_packs_are_the_same_for_any_number_of_ranks_and_any_batch(recipe: Recipe, encoder: Any) -> None:
    held = replace(recipe.evaluation, loss=HeldOutLossConfig(["two", "one"], max_packs=5))
    recipe, processor = replace(recipe, evaluation=held), Processor(encoder)
    stages = [recipe.stages["first"], replace(recipe.stages["first"], name="other", global_batch_packs=2)]
    assert [source.name for source in stage_data.used_sources(recipe)] == ["one", "two"]
    stage_data.ensure_shards(stage_data.used_sources(recipe))
    stage_data.ensure_lengths(recipe, stages, processor)
    one = stage_data.held_out_packs(recipe, stages[0], processor)
    assert one.source_of == ["two"] * 5 + ["one"] * 5
    assert [{key.partition("/")[0] for key in batch.keys} for batch in one.mine] == [{each} for each in one.source_of]
    for ranks in (2, 3):
        parts = [
            stage_data.held_out_packs(recipe, stages[1], processor, rank=rank, world_size=ranks)
            for rank in range(ranks)
        ]
        assert len({len(part.mine) for part in parts}) == 1
        for number, batch in enumerate(one.mine):
            other = parts[number % ranks].mine[number // ranks]
            assert other.keys == batch.keys
            assert torch.equal(other.input_ids, batch.input_ids)
        assert [b.num_samples for part in parts for b in part.mine].count(0) == -10 % ranks


def test_unmeasurable_samples_reach_the_ledger(recipe: Recipe, encoder: Any, tmp_path: Path) -> None:
    import tarfile

    folder = Path(recipe.data.root) / "never"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for i in range(20):
            row = b'{"messages": [{"role": "assistant", "content": "abc"}]}' if i else b"{broken"
            info = tarfile.TarInfo(f"k{i}.json")
            info.size = len(row)
            tar.addfile(info, io.BytesIO(row))
    stage = StageConfig(mixture={"never": 1}, sequence_length=200, global_batch_packs=1)
    bad = with_names(Recipe(name="bad", data=recipe.data, stages={"only": stage}))
    only, processor = bad.stages["only"], Processor(encoder)
    stage_data.ensure_shards(stage_data.used_sources(bad))
    stage_data.ensure_lengths(bad, [only], processor)
    plan = stage_data.stage_plan(bad, only, processor)
    assert plan.samples_per_epoch == 19
    stage_data.stage_loader(bad, only, plan, processor, ledger=Ledger(tmp_path / "q.jsonl"))
    assert json.loads((tmp_path / "q.jsonl").read_text())["key"] == "k0"


def test_the_parser_and_the_plan_import_nothing_heavy() -> None:
    code = (
        "import sys, argparse, alignvlm.cli.data as d; d.add_parser(argparse.ArgumentParser().add_subparsers());"
        "assert not {'numpy', 'torch', 'webdataset', 'PIL'} & set(sys.modules);"
        "import data_pipeline.order.plan, data_pipeline.order.summary;"
        "assert not {'torch', 'webdataset', 'PIL', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_warnings_of_the_library_reach_the_user(own_data: Path, tmp_path: Path, command: Command) -> None:
    """In a process of its own: here pytest's handlers would show them."""
    code = (
        "import logging, sys; from alignvlm.cli import main; from data_pipeline.shards import storage\n"
        "logging.basicConfig(stream=sys.stdout)\n"  # as a library might do
        "assert main(['data', 'verify', sys.argv[1]]) == 0\n"
        "storage.log.warning('the disk is slow')"
    )
    command("data", "write", "--from-jsonl", own_data / "rows.jsonl", "--images", own_data / "images", tmp_path / "o")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "o")], capture_output=True, text=True, check=True)
    assert done.stderr == "WARNING: the disk is slow\n"
