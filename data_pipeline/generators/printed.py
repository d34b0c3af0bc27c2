"""Printed numbers in real fonts, one square each: a number, a price tag, or a column of two or three numbers.

Print is what tables and charts hold. Here it stands alone and the digits are drawn evenly, so that a small model reads
it with few samples. Held-out samples use other fonts than training.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.generators.common import (
    add_grain,
    check_common,
    check_forms,
    check_range,
    choose,
    choose_form,
    make_record,
    new_page,
    pick_digits,
    pick_font,
    random_digits,
    samples,
)

WIDTHS = {"number": (12.0, 15.0), "price": (10.5, 11.3), "column": (10.0, 11.0)}
"""Narrowest and widest digit of each form, pixels."""
GOODS = ("Tea", "Milk", "Bread", "Rice", "Apples", "Salt", "Soap", "Pens", "Nails", "Oil", "Eggs", "Jam")
QUESTIONS = {"number": "Which number is printed?", "price": "What is the price?", "column": "What is in line {line}?"}
READ = ("Read it.", "Write what you see.", "Read all that is printed here.")
LINES = 3
"""Most lines of a column."""


def _draw_one(rng: np.random.Generator, form: str, text: str, split: str, size: int) -> Image.Image:
    """A number or a price below the name of the goods, which half of the tags have."""
    page, pen, ink = new_page(rng, size, size)
    if rng.random() < 0.5:
        font = pick_font(rng, split, 9, 11)
        pen.text((int(rng.integers(2, 8)), 2), choose(rng, GOODS), fill=ink, font=font)
    if rng.random() < 0.3:
        frame = int(rng.integers(120, 200))
        pen.rectangle((1, 1, size - 2, size - 2), outline=(frame, frame, frame))
    font = pick_digits(rng, split, *WIDTHS[form], tallest=size // 2)
    left = rng.uniform(2, np.clip(size - 2 - font.getlength(text), 3, 6))
    pen.text((left, size * rng.uniform(0.62, 0.72)), text, fill=ink, font=font, anchor="lm")
    return add_grain(rng, page)


def _draw_column(rng: np.random.Generator, lines: Sequence[str], split: str, size: int) -> Image.Image:
    """Numbers below each other, as they stand in the right half of a table: the last one at the bottom."""
    page, pen, ink = new_page(rng, size, size)
    right, step = size - int(rng.integers(2, 5)), size / LINES
    font = pick_digits(rng, split, *WIDTHS["column"], tallest=int(1.125 * step))
    for at, line in enumerate(lines, start=LINES - len(lines)):
        pen.text((right, (at + 0.5) * step), line, fill=ink, font=font, anchor="rm")
    return add_grain(rng, page)


def generate(
    *,
    split: str = "train",
    num_samples: int,
    seed: int = 0,
    kind: str = "transcribe",
    size: int = 48,
    digits: Sequence[int] = (1, 3),
    forms: Mapping[str, float] | None = None,
) -> Iterator[dict[str, Any]]:
    """`num_samples` records, made one by one.

    `digits` are the fewest and most digits of a number (a price has one before its point and two behind it); `forms`
    weighs `number`, `price` and `column`.
    """
    check_common(split, num_samples, seed, kind, size)
    weights = dict(forms or dict.fromkeys(WIDTHS, 1.0))
    check_forms("printed", weights, WIDTHS)
    check_range("printed", "digits", digits, 1, 3)

    def records() -> Iterator[dict[str, Any]]:
        for index, rng in samples(split, num_samples, seed, kind):
            form = choose_form(rng, weights)
            if form == "column":
                texts = [random_digits(rng, *digits) for _ in range(int(rng.integers(2, LINES + 1)))]
                image = _draw_column(rng, texts, split, size)
            else:
                text = f"{random_digits(rng, 1, 1)}.{random_digits(rng, 2, 2)}" if form == "price" else None
                texts = [text or random_digits(rng, *digits)]
                image = _draw_one(rng, form, texts[0], split, size)
            if kind == "transcribe":
                turns = [(choose(rng, READ), "\n".join(texts))]
            else:
                order = rng.permutation(len(texts))
                turns = [(QUESTIONS[form].format(line=at + 1), texts[at]) for at in order]
            yield make_record(f"printed-{split}-{index:06d}", "printed", [image], turns, form=form)

    return records()
