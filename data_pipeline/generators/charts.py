"""Bar charts of real columns (see real_tables.py): lying bars in colours between their labels and values.

Two tiles wide. Held-out samples use other tables and other fonts than training.
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
from data_pipeline.generators.real_tables import load_columns
from data_pipeline.generators.tables import pick_rows

COLOURS = {"red": (205, 45, 45), "blue": (50, 90, 200), "green": (50, 150, 70), "yellow": (240, 200, 50)}
QUESTIONS = {
    "value": "What is the value of the {colour} bar?",
    "highest": "Which bar is the highest?",
    "lowest": "Which bar is the lowest?",
    "count": "How many bars?",
}
READ = "Read the chart."


def _draw(
    rng: np.random.Generator, title: str, rows: list[tuple[str, int]], colours: list[str], split: str, size: int
) -> Image.Image:
    """Lying bars below each other: label, bar, value; a bar's length is its value over the largest one.

    It is three pixels at least, so that its colour can be seen. Two bars have a title above them.
    """
    width, height = 2 * size, size
    page, pen, ink = new_page(rng, width, height)
    value_font, label_font = pick_digits(rng, split, 10, 11, tallest=18), pick_font(rng, split, 8, 9)
    lines = max(len(rows), 3)
    step, first = height / lines, lines - len(rows)
    if first:
        pen.text((width / 2, step / 2), title, fill=ink, font=label_font, anchor="mm")
    left, right = width * 0.22, width - int(rng.integers(2, 5))
    longest = right - width * 0.38 - left
    thickness = step * rng.uniform(0.45, 0.7)
    most = max(max(value for _, value in rows), 1)
    if rng.random() < 0.5:
        pen.line((left, first * step, left, height), fill=ink)
    for at, ((label, value), colour) in enumerate(zip(rows, colours, strict=True), start=first):
        middle = (at + 0.5) * step
        tint = tuple(int(np.clip(part + rng.integers(-15, 16), 0, 255)) for part in COLOURS[colour])
        end = left + max(longest * value / most, 3)
        pen.rectangle((left, middle - thickness / 2, end, middle + thickness / 2), fill=(tint[0], tint[1], tint[2]))
        pen.text((right, middle), str(value), fill=ink, font=value_font, anchor="rm")
        shown = next(part for end in range(len(label), -1, -1) if label_font.getlength(part := label[:end]) <= left - 3)
        pen.text((left - 2, middle), shown, fill=ink, font=label_font, anchor="rm")
    return add_grain(rng, page)


def _questions(ask: Sequence[str], rows: list[tuple[str, int]], colours: list[str]) -> list[tuple[str, str, str]]:
    """Type, question and answer of all that can be asked about the chart."""
    values = [value for _, value in rows]
    answers = {
        "highest": colours[int(np.argmax(values))],
        "lowest": colours[int(np.argmin(values))],
        "count": str(len(rows)),
    }
    questions = []
    for about in ask:
        if about == "value":
            for colour, value in zip(colours, values, strict=True):
                questions.append((about, QUESTIONS[about].format(colour=colour), str(value)))
        else:
            questions.append((about, QUESTIONS[about], answers[about]))
    return questions


def generate(
    *,
    split: str = "train",
    num_samples: int,
    seed: int = 0,
    kind: str = "transcribe",
    size: int = 48,
    bars: Sequence[int] = (2, 3),
    turns: int = 2,
    ask: Sequence[str] = ("value", "highest", "lowest", "count"),
) -> Iterator[dict[str, Any]]:
    """`num_samples` records, made one by one.

    `bars` are fewest and most bars, `turns` questions per image, `ask` their types.
    """
    check_common(split, num_samples, seed, kind, size)
    check_range("charts", "bars", bars, 2, len(COLOURS))
    check_questions("charts", ask, QUESTIONS, turns)

    def records() -> Iterator[dict[str, Any]]:
        columns = load_columns(split)
        for index, rng in samples(split, num_samples, seed, kind):
            column = choose(rng, columns)
            picked = pick_rows(rng, column, int(rng.integers(bars[0], bars[1] + 1)))
            colours = [list(COLOURS)[int(i)] for i in rng.permutation(len(COLOURS))[: len(picked)]]
            image = _draw(rng, column.name, picked, colours, split, size)
            if kind == "transcribe":
                read = "\n".join(f"{colour} {value}" for (_, value), colour in zip(picked, colours, strict=True))
                talk, about = [(READ, read)], "read"
            else:
                talk, about = pick_questions(rng, _questions(ask, picked, colours), turns)
            yield make_record(f"charts-{split}-{index:06d}", "charts", [image], talk, table=column.table, about=about)

    return records()
