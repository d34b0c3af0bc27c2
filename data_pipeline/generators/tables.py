"""Crops of real tables (see real_tables.py), printed with real fonts: a header, row labels and one column of values.

The images are two tiles wide. Held-out samples use other tables and other fonts than training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.generators.common import (
    add_grain,
    check_common,
    check_questions,
    check_range,
    choose,
    make_record,
    new_page,
    pick_digits,
    pick_font,
    pick_questions,
    samples,
)
from data_pipeline.generators.real_tables import Column, load_columns

QUESTIONS = {
    "label": "What is the value of {label}?",
    "row": "What is the value in row {row}?",
    "largest": "What is the largest value?",
    "count": "How many rows?",
}
READ = "Read the table."
READ_VALUES = "Read the values."


def _draw(rng: np.random.Generator, column: Column, rows: list[tuple[str, int]], split: str, size: int) -> Image.Image:
    """A table of two tiles: labels on the left, values on the right, with the rules and shades that tables have.

    Two rows have a header above them; three fill the height.
    """
    width, height = 2 * size, size
    page, pen, ink = new_page(rng, width, height)
    lines = [(label, str(value)) for label, value in rows]
    header = len(rows) < 3
    if header:
        lines.insert(0, ("", column.name))
    step = height / len(lines)
    label_font, value_font = pick_font(rng, split, 9, 11), pick_digits(rng, split, 10, 11, tallest=18)
    left, right = int(rng.integers(2, 5)), width - int(rng.integers(2, 5))
    rule = int(rng.integers(110, 190))
    style = int(rng.integers(3))  # rule under the header, shaded header, all rules
    if style == 1 and header:
        shade = int(rng.integers(190, 220))
        pen.rectangle((0, 0, width, int(step) - 1), fill=(shade, shade, shade + 10))
    for line in range(1, len(lines)) if style == 2 else (1,):
        pen.line((0, int(line * step), width, int(line * step)), fill=(rule, rule, rule))
    for line, (label, value) in enumerate(lines):
        middle = (line + 0.5) * step
        pen.text((left, middle), label, fill=ink, font=label_font, anchor="lm")
        font = label_font if header and line == 0 else value_font
        pen.text((right, middle), value, fill=ink, font=font, anchor="rm")
    return add_grain(rng, page)


def pick_rows(rng: np.random.Generator, column: Column, count: int) -> list[tuple[str, int]]:
    """`count` rows of the column with distinct labels and values, in the table's order (fewer if it has no more)."""
    rows: dict[str, int] = {}
    order = rng.permutation(len(column.rows))[: 8 * count]
    chosen = []
    for at in order:
        label, value = column.rows[int(at)]
        if label not in rows and value not in rows.values():
            rows[label] = value
            chosen.append(int(at))
        if len(chosen) == count:
            break
    return [column.rows[at] for at in sorted(chosen)]


def _questions(ask: Sequence[str], rows: list[tuple[str, int]]) -> list[tuple[str, str, str]]:
    """Type, question and answer of all that can be asked about the table."""
    values = [value for _, value in rows]
    answers = {"largest": max(values), "count": len(rows)}
    questions = []
    for about in ask:
        if about in ("label", "row"):
            for row, (label, value) in enumerate(rows, start=1):
                questions.append((about, QUESTIONS[about].format(label=label, row=row), str(value)))
        else:
            questions.append((about, QUESTIONS[about], str(answers[about])))
    return questions


def generate(
    *,
    split: str = "train",
    num_samples: int,
    seed: int = 0,
    kind: str = "transcribe",
    size: int = 48,
    rows: Sequence[int] = (2, 3),
    turns: int = 2,
    ask: Sequence[str] = ("label", "row", "largest", "count"),
    labels: bool = True,
) -> Iterator[dict[str, Any]]:
    """`num_samples` records, made one by one.

    `rows` are fewest and most rows, `turns` questions per image, `ask` their types.
    Without `labels` a transcription leaves the row labels out.
    """
    check_common(split, num_samples, seed, kind, size)
    check_range("tables", "rows", rows, 1, 3)
    check_questions("tables", ask, QUESTIONS, turns)

    def records() -> Iterator[dict[str, Any]]:
        columns = load_columns(split)
        for index, rng in samples(split, num_samples, seed, kind):
            column = choose(rng, columns)
            picked = pick_rows(rng, column, int(rng.integers(rows[0], rows[1] + 1)))
            image = _draw(rng, column, picked, split, size)
            if kind == "transcribe":
                if labels:
                    talk = [(READ, "\n".join(f"{label} {value}" for label, value in picked))]
                else:
                    talk = [(READ_VALUES, "\n".join(str(value) for _, value in picked))]
                about = "read"
            else:
                talk, about = pick_questions(rng, _questions(ask, picked), turns)
            yield make_record(f"tables-{split}-{index:06d}", "tables", [image], talk, table=column.table, about=about)

    return records()
