"""The built-in generators: pure functions of their arguments, honest splits, answers that the picture decides."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.generators import GENERATORS, generate
from data_pipeline.generators.charts import COLOURS
from data_pipeline.generators.common import FONTS, load_font
from data_pipeline.generators.fields import digit_indices, load_digit_images
from data_pipeline.generators.real_tables import MAX_LABEL, TABLES, load_columns

ALL = list(itertools.product(sorted(GENERATORS), ("train", "heldout"), ("transcribe", "questions")))


Record = dict[str, Any]


def take(name: str, count: int = 40, **args: Any) -> list[Record]:
    return list(generate(name, num_samples=count, **args))


def same(left: Record, right: Record) -> bool:
    plain = [{key: value for key, value in record.items() if key != "images"} for record in (left, right)]
    pixels = [[np.asarray(image) for image in record["images"]] for record in (left, right)]
    return plain[0] == plain[1] and all(np.array_equal(a, b) for a, b in zip(*pixels, strict=True))


@pytest.mark.parametrize(("name", "split", "kind"), ALL)
def test_records_are_chats_with_their_images(name: str, split: str, kind: str) -> None:
    records = take(name, split=split, kind=kind)
    assert len({record["key"] for record in records}) == len(records)
    for record in records:
        assert not set("./ ") & set(record["key"])
        assert [message["role"] for message in record["messages"]] == ["user", "assistant"] * (
            len(record["messages"]) // 2
        )
        placeholders = [message["content"].count("<image>") for message in record["messages"]]
        assert placeholders == [len(record["images"])] + [0] * (len(placeholders) - 1)
        assert record["answers"] == [record["messages"][-1]["content"]]
        assert record["task"] == name
        assert all(image.mode == "RGB" and image.height == 48 and image.width in (48, 96) for image in record["images"])


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_samples_depend_on_the_arguments_only(name: str) -> None:
    first = take(name, seed=3)
    random.seed(5)
    np.random.seed(5)
    assert all(same(a, b) for a, b in zip(first, take(name, seed=3), strict=True))
    assert all(same(a, b) for a, b in zip(first[:7], take(name, 7, seed=3), strict=True)), (
        "a longer run starts the same"
    )
    assert not any(same(a, b) for a, b in zip(first, take(name, seed=4), strict=True))
    state = random.getstate(), np.random.get_state()[1].tolist()
    take(name, 3)
    assert state == (random.getstate(), np.random.get_state()[1].tolist())


def test_no_digit_image_is_in_both_splits() -> None:
    train, heldout = ({i for group in digit_indices(split) for i in group} for split in ("train", "heldout"))
    assert not train & heldout
    assert train | heldout == set(range(1797))
    assert all(len(group) >= 30 for group in digit_indices("heldout"))
    for split, allowed in (("train", train), ("heldout", heldout)):
        used = {
            i
            for kind in ("transcribe", "questions")
            for r in take("fields", split=split, kind=kind)
            for i in r["digit_images"]
        }
        assert used
        assert used <= allowed


def test_written_digits_are_the_answer() -> None:
    classes = load_digit_images()[1]
    for record in take("fields", 80, kind="transcribe"):
        digits = [int(char) for char in record["answers"][0] if char.isdigit()]
        assert digits == [classes[i] for i in record["digit_images"]]


def test_no_table_and_no_font_is_in_both_splits() -> None:
    tables = {split: {table.file for table in TABLES[split]} for split in TABLES}
    assert not tables["train"] & tables["heldout"]
    assert not set(FONTS["train"]) & set(FONTS["heldout"])
    for split in tables:
        for name in ("tables", "charts"):
            assert {record["table"] for record in take(name, split=split)} <= tables[split]
        assert {column.table for column in load_columns(split)} == tables[split]
        assert all(load_font(font, 12).getlength("0") > 0 for font in FONTS[split])


def test_table_values_are_real_and_short() -> None:
    for column in load_columns("train") + load_columns("heldout"):
        assert len(column.rows) >= 6
        assert all(label and len(label) <= MAX_LABEL and 0 <= value <= 999 for label, value in column.rows)
    nile = next(column for column in load_columns("heldout") if column.name == "Nile")
    assert ("1879", 1370) not in nile.rows
    assert ("1877", 813) in nile.rows


def test_table_answers_follow_from_the_rows() -> None:
    for record in take("tables", 60, kind="transcribe"):
        rows = [line.rsplit(" ", 1) for line in record["answers"][0].split("\n")]
        assert 2 <= len(rows) <= 3
        assert len({label for label, _ in rows}) == len({value for _, value in rows}) == len(rows)
        real = {row for column in load_columns("train") if column.table == record["table"] for row in column.rows}
        assert {(label, int(value)) for label, value in rows} <= real


def test_highest_and_lowest_bars_are_told_by_colour() -> None:
    for record in take("charts", 60, kind="questions", ask=["highest", "lowest"], turns=2):
        said = {m["content"].removeprefix("<image>"): answer["content"] for m, answer in pairs_of(record["messages"])}
        highest, lowest = said["Which bar is the highest?"], said["Which bar is the lowest?"]
        assert {highest, lowest} <= set(COLOURS)
        assert highest != lowest


def pairs_of(messages: list[Record]) -> list[tuple[Record, Record]]:
    return list(zip(messages[::2], messages[1::2], strict=True))


@pytest.mark.parametrize(("name", "count"), [("tables", 5), ("charts", 6)])
def test_everything_is_asked_once_and_in_any_order(name: str, count: int) -> None:
    """Each row by its number and the largest value; each bar by its colour, the highest and the lowest; the counts."""
    ask = ["row", "largest", "count"] if name == "tables" else ["value", "highest", "lowest", "count"]
    last = set()
    for record in take(name, 30, kind="questions", ask=ask, turns=9):
        talk = pairs_of(record["messages"])
        rows = int(next(answer["content"] for question, answer in talk if "How many" in question["content"]))
        assert (
            len({question["content"].removeprefix("<image>") for question, _ in talk}) == len(talk) == rows + count - 3
        )
        last.add(record["about"])
    assert last == set(ask)


def test_bars_show_their_colour_and_length() -> None:
    """Each bar lies in its row, in its colour, and is 35 pixels long times its value over the largest one."""
    for record in take("charts", 60, kind="transcribe"):
        rows = [line.split(" ") for line in record["answers"][0].split("\n")]
        most = max(int(value) for _, value in rows)
        pixels = np.asarray(record["images"][0]).astype(int)[:, :60]  # without the values, which have the colours too
        slots = np.array_split(pixels, 3)[-len(rows) :]
        for slot, (colour, value) in zip(slots, rows, strict=True):
            near = np.abs(slot - COLOURS[colour]).max(axis=-1) < 45
            length = int((near.sum(axis=0) >= 0.35 * slot.shape[0]).sum())  # columns in which it is as thick as a bar
            assert length == pytest.approx(max(35 * int(value) / most, 3) + 1, abs=2), record["key"]


def test_printed_numbers_are_as_asked_and_inside_their_square() -> None:
    prices = take("printed", 80, forms={"price": 1}, kind="questions")
    assert all(re.fullmatch(r"\d\.\d\d", record["answers"][0]) for record in prices)
    columns = take("printed", 80, forms={"column": 1}, kind="transcribe", digits=[2, 3])
    assert all(re.fullmatch(r"\d{2,3}(\n\d{2,3}){1,2}", record["answers"][0]) for record in columns)
    assert {record["form"] for record in take("printed", 60)} == {"number", "price", "column"}
    for record in prices + columns:
        ink = np.asarray(record["images"][0].convert("L")) < 100
        assert ink.any()
        assert not ink[:, -1].any(), record["key"]  # the last digit is not cut off


def test_two_images_and_lists_are_asked_in_any_order() -> None:
    pairs = take("fields", 30, kind="questions", forms={"pair": 1})
    assert all(len(record["images"]) == 2 for record in pairs)
    assert {record["messages"][0]["content"].split(" ")[-2] for record in pairs} == {"first", "second"}
    lists = take("fields", 30, kind="questions", forms={"list": 1})
    assert {len(record["messages"]) for record in lists} == {4, 6}


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("feilds", {}, "did you mean 'fields'.*known: charts, fields, printed, tables"),
        ("fields", {"split": "test"}, "one of train, heldout"),
        ("fields", {"kind": "caption"}, "one of transcribe, questions"),
        ("fields", {"forms": {"cheque": 1}}, "cheque"),
        ("fields", {"digits": [2, 1]}, "digits"),
        ("printed", {"forms": {"price": 0}}, "at least is above 0"),
        ("tables", {"rows": [0, 2]}, "rows"),
        ("charts", {"ask": ["sum"]}, "sum"),
        ("charts", {"colours": 3}, "colours"),
    ],
)
def test_mistakes_are_named(name: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        take(name, 1, **args)
