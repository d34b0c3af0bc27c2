"""Perplexity on held-out text: against the language model alone in fp64, in every layout, on any number of ranks."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from alignvlm.cli.evaluation.evaluate import show_texts
from alignvlm.config import load_recipe
from alignvlm.config.schema import Recipe
from alignvlm.config.sections.evaluation import TextConfig
from alignvlm.errors import UserError
from alignvlm.evaluation.answering import load_export
from alignvlm.evaluation.perplexity import documents, measure_texts, read_texts, windows
from alignvlm.run_folder import EvaluationFolder
from alignvlm.system.ranks import Ranks
from data_pipeline.errors import DataError
from tests.evaluation.thread_ranks import ThreadRanks
from tests.jobs import TINY
from tests.tiny import tiny_model

PAGES = ["what is the total of  two names", "the answer is 12.50\nread the field <image> <|im_end|>", "date"]


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "export"
    model, processor = tiny_model()
    model.double().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def loaded(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that are threads share one model: transformers loads one at a time."""
    model = load_export(export, "cpu")
    monkeypatch.setattr("alignvlm.evaluation.perplexity.load_export", lambda folder, device: model)


def recipe_of(folder: Path, window: int = 2048) -> Recipe:
    rows = [{"text": page} for page in (PAGES[0], "  ", *PAGES[1:])]
    (folder / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(str(TINY))
    text = {"pages": TextConfig(str(folder / "pages.jsonl"), "pages", window=window)}
    return replace(recipe, evaluation=replace(recipe.evaluation, text=text))


def test_windows_predict_every_token_once_as_lm_evaluation_harness_does() -> None:
    count = lambda first, last: list(range(first, last + 1))
    # The case of lm_eval's own test of get_rolling_token_windows with a context of one token.
    assert list(windows(count(0, 33), -100, 10)) == [
        ([-100, *count(0, 8)], count(0, 9)),
        (count(9, 18), count(10, 19)),
        (count(19, 28), count(20, 29)),
        (count(23, 32), count(30, 33)),
    ]
    assert list(windows([7], 1, 10)) == [([1], [7])]
    assert list(windows([], 1, 10)) == []


def test_the_numbers_are_those_of_the_language_model_alone(export: Path, tmp_path: Path) -> None:
    model, processor = tiny_model()
    model, tokenizer = model.double().eval(), processor.tokenizer
    nats, tokens = 0.0, 0
    for page in PAGES:
        ids = tokenizer(page, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert not set(ids) & set(tokenizer.all_special_ids)  # text is data
        with torch.no_grad():
            hidden = model.model.language_model(torch.tensor([[tokenizer.eos_token_id, *ids[:-1]]])).last_hidden_state
            logits = model.lm_head(hidden)[0]
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum"))
        tokens += len(ids)
    found = measure_texts(export, recipe_of(tmp_path), tmp_path / "out", device="cpu")["texts"]["pages"]
    size, words = sum(len(page.encode()) for page in PAGES), 7 + 9 + 1
    assert (found["documents"], found["tokens"]) == (3, tokens)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-9)
    assert found["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-9)
    assert found["byte_perplexity"] == pytest.approx(math.exp(nats / size), rel=1e-9)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-9)


@pytest.mark.usefixtures("loaded")
def test_ranks_share_the_documents_and_nothing_is_measured_twice(
    export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, told = recipe_of(tmp_path, window=5), list[Any]()
    alone = measure_texts(export, recipe, tmp_path / "one", device="cpu")

    def measure(ranks: Ranks) -> dict[str, Any]:
        return measure_texts(export, recipe, tmp_path / "two", ranks=ranks, device="cpu")

    one, other = ThreadRanks(2).run(measure)
    assert one == other
    assert one["texts"] == alone["texts"]
    assert not list((tmp_path / "two" / "parts").iterdir())
    monkeypatch.setattr("alignvlm.evaluation.perplexity.load_export", lambda *a: told.append(a))
    assert measure_texts(export, recipe, tmp_path / "one", device="cpu") == alone
    assert told == []


@pytest.mark.usefixtures("loaded")
def test_what_is_wrong_with_a_text_is_said_on_all_ranks(export: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    rows = [{"text": "one"}, {"text": "two"}, {"text": "three"}, {"body": "no text"}, {"text": "five"}]
    for content, message in (
        ("".join(json.dumps(row) + "\n" for row in rows), "row 4: no text in the field 'text'"),
        (json.dumps({"text": " "}) + "\n", "has no document"),  # rank 0 finds that at the end
        (None, "no such file or folder"),  # and this before anything
    ):
        (tmp_path / "pages.jsonl").unlink()
        if content is not None:
            (tmp_path / "pages.jsonl").write_text(content)
        errors = ThreadRanks(2).run(
            lambda ranks: measure_texts(export, recipe, tmp_path / "out", ranks=ranks, device="cpu")
        )
        assert [message in str(error) for error in errors] == [True, True], errors


def test_texts_come_in_several_layouts(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    assert list(documents(TextConfig(str(tmp_path / "a.txt")))) == ["one\n\ntwo"]
    (tmp_path / "hub").mkdir()
    table = pyarrow.table({"page": ["x", "", "y"]})
    pyarrow.parquet.write_table(table, tmp_path / "hub" / "test-00000-of-00001.parquet")
    assert list(documents(TextConfig(str(tmp_path / "hub"), field="page"))) == ["x", "y"]
    with pytest.raises(DataError, match=r"row 1: no text in the field 'text' \(fields: page\); name it in .*\.field"):
        list(documents(TextConfig(str(tmp_path / "hub"))))
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"bad\.txt: not a text in UTF-8"):
        list(documents(TextConfig(str(tmp_path / "bad.txt"))))
    with pytest.raises(DataError, match="no such file or folder"):
        list(documents(TextConfig(str(tmp_path / "missing.jsonl"))))


def test_a_text_without_documents_is_an_error(export: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    (tmp_path / "pages.jsonl").write_text(json.dumps({"text": " "}) + "\n")
    with pytest.raises(UserError, match=r"evaluation\.text\.pages: .*pages\.jsonl has no document"):
        measure_texts(export, recipe, tmp_path / "out", device="cpu")


def test_a_text_too_unlikely_for_floating_point_hides_no_other(export: Path, tmp_path: Path) -> None:
    """One word of many tokens: `exp` of its nats is infinite, and JSON has null for that."""
    page = "x7q" * 400
    (tmp_path / "words.txt").write_text(page)
    recipe = recipe_of(tmp_path)
    texts = {"words": TextConfig(name="words", path=str(tmp_path / "words.txt"))}
    recipe = replace(recipe, evaluation=replace(recipe.evaluation, text=texts))
    measure_texts(export, recipe, tmp_path / "out")
    found = read_texts(EvaluationFolder(tmp_path / "out"))["texts"]["words"]
    assert found["word_perplexity"] is None
    assert found["perplexity"] > 1
    show_texts({"texts": {"words": found}})
