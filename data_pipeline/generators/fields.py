"""Form fields and amounts written with scikit-learn's 1,797 real handwritten digits (8 x 8 pixels, UCI, 13 writers).

A field is a square of `size` pixels with 1-3 digits, often with a printed label and a box; an amount is twice as wide
and has a printed decimal separator; a pair is two fields; a list is a square with two or three numbers below each
other, which gives many characters to learn from per image. Training and held-out samples share no digit image.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_pipeline.generators.common import (
    add_grain,
    check_common,
    check_forms,
    check_range,
    choose,
    choose_form,
    make_record,
    new_page,
    pick_font,
    random_digits,
    samples,
)

LABELS = ("Age", "No.", "Qty", "Day", "Room", "Item", "Page", "Code", "Row", "Lot", "Seat", "Year")
QUESTIONS = {
    "field": ("Which number is written?", "What is in the field?"),
    "amount": ("Which amount is written?", "How much is it?"),
    "first": ("What is in the first field?",),
    "second": ("What is in the second field?",),
    "list": ("What is in line {line}?",),
}
FORMS = ("field", "amount", "pair", "list")
READ = ("Read it.", "Write what you see.", "Read all that is written here.")
"""Prompts of several lengths, asked beside a field's own questions. With a single prompt a small model learns how far a
digit is from the prompt's end, and forgets how to read when the questions of later stages have other lengths."""
CELLS = 3.0
"""A square holds this many digits side by side: people write small and large numbers equally big."""


@functools.lru_cache(maxsize=1)
def load_digit_images() -> tuple[np.ndarray, np.ndarray]:
    """All digit images (uint8 [1797, 8, 8], 255 = ink) and their classes [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return np.clip(data.images * 16, 0, 255).astype(np.uint8), data.target.astype(np.int64)


@functools.lru_cache(maxsize=2)
def digit_indices(split: str) -> tuple[tuple[int, ...], ...]:
    """The digit images of the split for each class 0-9; every fifth image of a class is held out."""
    classes = load_digit_images()[1]
    held_out = split == "heldout"
    groups = [np.flatnonzero(classes == digit) for digit in range(10)]
    return tuple(tuple(int(i) for at, i in enumerate(group) if (at % 5 == 4) == held_out) for group in groups)


def _write(
    rng: np.random.Generator,
    page: Image.Image,
    ink: tuple[int, int, int],
    text: str,
    split: str,
    area: tuple[int, int, int, int],
    cells: float,
) -> list[int]:
    """Write `text` into the area (left, top, right, bottom; pixels), separators printed; return its digit images."""
    pen, (left, top, right, bottom) = ImageDraw.Draw(page), area
    widths = [0.5 if char in ".," else 1.0 for char in text]
    cell = min((right - left) / max(sum(widths), cells), bottom - top) * rng.uniform(0.92, 1.0)
    x = left + rng.uniform(0, min(right - left - cell * sum(widths), 0.3 * cell))
    base = bottom - rng.uniform(0, min(bottom - top - cell, 0.4 * cell))
    used = []
    for char, width in zip(text, widths, strict=True):
        if char in ".,":
            pen.text(
                (x + cell * 0.25, base),
                char,
                fill=ink,
                font=pick_font(rng, split, int(cell), int(1.3 * cell)),
                anchor="ms",
            )
        else:
            index = choose(rng, digit_indices(split)[int(char)])
            wide, high = int(cell * rng.uniform(0.9, 1.1)), int(min(cell * rng.uniform(1.1, 1.4), base - top))
            alpha = Image.fromarray(load_digit_images()[0][index]).resize((wide, high), Image.Resampling.BICUBIC)
            strength = rng.uniform(0.75, 1.3)
            page.paste(ink, (int(x), int(base - high)), alpha.point([min(int(v * strength), 255) for v in range(256)]))
            used.append(index)
        x += cell * width
    return used


def _draw(
    rng: np.random.Generator, lines: list[str], split: str, size: int, wide: int
) -> tuple[Image.Image, list[int]]:
    """One square with `lines` below each other, `wide` tiles of `size` pixels wide; only a single line has a label."""
    width = size * wide
    page, pen, ink = new_page(rng, width, size)
    style = int(rng.integers(4)) if len(lines) == 1 else 0  # bare, label, label and box, label and line
    top = 2 if style == 0 else int(size * 0.25)
    if style:
        font = pick_font(rng, split, 10, 12)
        pen.text((int(rng.integers(2, size // 4)), 1), choose(rng, LABELS), fill=ink, font=font)
    frame = int(rng.integers(120, 200))
    if style == 2:
        pen.rectangle((1, top, width - 2, size - 2), outline=(frame, frame, frame))
    elif style == 3:
        pen.line((3, size - 3, width - 4, size - 3), fill=(frame, frame, frame))
    used, high = [], (size - 2 - top) / len(lines)
    for at, line in enumerate(lines):
        area = (2, int(top + at * high), width - 2, int(top + (at + 1) * high))
        used += _write(rng, page, ink, line, split, area, CELLS * wide)
    return add_grain(rng, page), used


def _turns(rng: np.random.Generator, kind: str, form: str, texts: list[str]) -> list[tuple[str, str]]:
    if kind == "transcribe":
        prompts = READ + QUESTIONS["field"] if form == "field" else READ
        return [(choose(rng, prompts), "\n".join(texts))]
    if form == "pair":
        order = rng.permutation(2)
        return [(QUESTIONS[("first", "second")[i]][0], texts[i]) for i in order]
    if form == "list":
        order = rng.permutation(len(texts))
        return [(QUESTIONS["list"][0].format(line=i + 1), texts[i]) for i in order]
    return [(choose(rng, QUESTIONS[form]), texts[0])]


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

    `digits` are the fewest and most digits of a number (an amount has 1-2 before its separator and two behind it);
    `forms` weighs `field` (one number), `list` (two or three numbers in one image), `amount` (one image of two tiles)
    and `pair` (two images).
    """
    check_common(split, num_samples, seed, kind, size)
    weights = dict(forms or {"field": 0.5, "list": 0.2, "amount": 0.15, "pair": 0.15})
    check_forms("fields", weights, FORMS)
    check_range("fields", "digits", digits, 1, 3)

    def records() -> Iterator[dict[str, Any]]:
        for index, rng in samples(split, num_samples, seed, kind):
            form = choose_form(rng, weights)
            if form == "amount":
                texts = [random_digits(rng, 1, 2) + choose(rng, ".,") + random_digits(rng, 2, 2)]
            else:
                count = {"field": 1, "pair": 2}.get(form) or int(rng.integers(2, 4))
                texts = [random_digits(rng, digits[0], digits[1]) for _ in range(count)]
            if form == "pair":
                drawn = [_draw(rng, [text], split, size, 1) for text in texts]
            else:
                drawn = [_draw(rng, texts, split, size, 2 if form == "amount" else 1)]
            images = [image for image, _ in drawn]
            used = [digit for _, digits_used in drawn for digit in digits_used]
            turns = _turns(rng, kind, form, texts)
            yield make_record(f"fields-{split}-{index:06d}", "fields", images, turns, form=form, digit_images=used)

    return records()
