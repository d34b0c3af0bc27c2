"""Bar charts of real columns (see real_tables.py): coloured bars, their values on top, their labels below.

Two tiles wide. Held-out samples use other tables and other fonts than training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.errors import ArgumentError
from data_pipeline.generators.common import add_grain, check_common, choose, make_record, new_page, pick_font, samples
from data_pipeline.generators.real_tables import load_columns
from data_pipeline.generators.tables import pick_rows

COLOURS = {
    "red": (205, 50, 45),
    "blue": (50, 95, 190),
    "green": (60, 155, 70),
    "orange": (240, 150, 40),
    "purple": (135, 80, 170),
    "gray": (130, 130, 130),
}
QUESTIONS = {
    "value": "What is the value of the {colour} bar?",
    "highest": "Which bar is the highest?",
    "lowest": "Which bar is the lowest?",
    "count": "How many bars?",
}
READ = "Read the chart."


def _draw(
    rng: np.random.Generator, rows: list[tuple[str, int]], colours: list[str], split: str, size: int
) -> Image.Image:
    """The chart; a bar's height is its value over the largest one."""
    width, height = 2 * size, size
    page, pen, ink = new_page(rng, width, height)
    value_font, label_font = pick_font(rng, split, 11, 12 if len(rows) > 3 else 14), pick_font(rng, split, 8, 9)
    floor, ceiling = height - 10, 14
    step = width / len(rows)
    thickness = step * rng.uniform(0.4, 0.7)
    most = max(max(value for _, value in rows), 1)
    if rng.random() < 0.5:
        pen.line((0, floor, width, floor), fill=ink)
    for at, ((label, value), colour) in enumerate(zip(rows, colours, strict=True)):
        middle = (at + 0.5) * step
        top = floor - (floor - ceiling) * value / most
        tint = tuple(int(np.clip(part + rng.integers(-20, 21), 0, 255)) for part in COLOURS[colour])
        pen.rectangle((middle - thickness / 2, top, middle + thickness / 2, floor), fill=(tint[0], tint[1], tint[2]))
        pen.text((middle, top - 1), str(value), fill=ink, font=value_font, anchor="mb")
        pen.text((middle, floor + 1), label[: int(step // 5.6)], fill=ink, font=label_font, anchor="ma")
    return add_grain(rng, page, float(rng.uniform(0, 3)))


def _ask(rng: np.random.Generator, about: str, rows: list[tuple[str, int]], colours: list[str]) -> tuple[str, str]:
    values = [value for _, value in rows]
    bar = int(rng.integers(len(rows)))
    question = QUESTIONS[about].format(colour=colours[bar])
    if about == "count":
        return question, str(len(rows))
    if about == "value":
        return question, str(values[bar])
    return question, colours[int(np.argmax(values) if about == "highest" else np.argmin(values))]


def generate(
    *,
    split: str = "train",
    num_samples: int,
    seed: int = 0,
    kind: str = "transcribe",
    size: int = 48,
    bars: Sequence[int] = (2, 4),
    turns: int = 2,
    ask: Sequence[str] = ("value", "highest", "lowest", "count"),
) -> Iterator[dict[str, Any]]:
    """`num_samples` records, made one by one.

    `bars` are fewest and most bars, `turns` questions per image, `ask` their types.
    """
    check_common(split, num_samples, seed, kind, size)
    if len(bars) != 2 or not 2 <= bars[0] <= bars[1] <= 5:
        raise ArgumentError(f"charts: bars {list(bars)}: fewest and most, between 2 and 5", "bars")
    if not ask or not set(ask) <= set(QUESTIONS) or turns < 1:
        raise ArgumentError(f"charts: ask {list(ask)} of {', '.join(QUESTIONS)}; turns {turns} at least 1", "ask")
    return _records(split, num_samples, seed, kind, size, bars, turns, ask)


def _records(
    split: str, num_samples: int, seed: int, kind: str, size: int, bars: Sequence[int], turns: int, ask: Sequence[str]
) -> Iterator[dict[str, Any]]:
    columns = load_columns(split)
    for index, rng in samples(split, num_samples, seed, kind):
        column = choose(rng, columns)
        picked = pick_rows(rng, column, int(rng.integers(bars[0], bars[1] + 1)))
        colours = [list(COLOURS)[int(i)] for i in rng.permutation(len(COLOURS))[: len(picked)]]
        image = _draw(rng, picked, colours, split, size)
        if kind == "transcribe":
            read = "\n".join(f"{colour} {value}" for (_, value), colour in zip(picked, colours, strict=True))
            talk, about = [(READ, read)], "read"
        else:
            asked = [ask[int(i)] for i in rng.permutation(len(ask))[:turns]]
            talk, about = [_ask(rng, what, picked, colours) for what in asked], asked[-1]
        yield make_record(f"charts-{split}-{index:06d}", "charts", [image], talk, table=column.table, about=about)
