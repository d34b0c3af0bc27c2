"""What the generators share: seeds, splits, fonts, paper, and the shape of a record. Nothing about digits or tables."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.errors import ArgumentError, DataError

SPLITS = ("train", "heldout")
KINDS = ("transcribe", "questions")

FONTS = {
    "train": (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSans-Oblique",
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSerif-Bold",
        "DejaVuSerif-Italic",
        "STIXGeneralBol",
    ),
    "heldout": ("DejaVuSerif", "DejaVuSansMono-Oblique", "STIXGeneral", "DejaVuSans-BoldOblique"),
}
"""Typefaces that come with matplotlib; no font is in both splits."""


MAX_SAMPLES = 10**8
SIDES = (24, 4096)
"""Pixels of the side of a square."""
GRAIN = 3
"""Largest standard deviation of the noise on a page, in grey levels."""


def check_common(split: str, num_samples: int, seed: int, kind: str, size: int) -> None:
    """Raise DataError for arguments of every generator that are out of range."""
    if split not in SPLITS:
        raise ArgumentError(f"split {split!r}: must be one of {', '.join(SPLITS)}", "split")
    if kind not in KINDS:
        raise ArgumentError(f"kind {kind!r}: must be one of {', '.join(KINDS)}", "kind")
    for name, value, least, most in (
        ("num_samples", num_samples, 0, MAX_SAMPLES),
        ("seed", seed, 0, 2**63 - 1),
        ("size", size, *SIDES),
    ):
        if not least <= value <= most:
            raise ArgumentError(f"{name} {value}: must be from {least:,} to {most:,}", name)


def check_range(generator: str, name: str, values: Sequence[int], least: int, most: int) -> None:
    """Raise ArgumentError unless the values are a fewest and a most between these bounds."""
    if len(values) != 2 or not least <= values[0] <= values[1] <= most:
        wanted = f"must be the fewest and the most, between {least} and {most}"
        raise ArgumentError(f"{generator}: {name} {list(values)}: {wanted}", name)


def check_forms(generator: str, weights: Mapping[str, float], forms: Iterable[str]) -> None:
    """Raise ArgumentError unless the weights are of these forms, none below 0 and not all 0."""
    if not set(weights) <= set(forms) or min(weights.values()) < 0 or not sum(weights.values()):
        wanted = f"must be weights of {', '.join(forms)}, of which one at least is above 0"
        raise ArgumentError(f"{generator}: forms {weights}: {wanted}", "forms")


def check_questions(generator: str, ask: Sequence[str], known: Iterable[str], turns: int) -> None:
    """Raise ArgumentError unless there is a type of question, each is known, and there is a turn."""
    if not ask or not set(ask) <= set(known) or turns < 1:
        wanted = f"ask must be some of {', '.join(known)}, and turns at least 1"
        raise ArgumentError(f"{generator}: ask {list(ask)}, turns {turns}: {wanted}", "ask")


def samples(split: str, num_samples: int, seed: int, kind: str) -> Iterator[tuple[int, np.random.Generator]]:
    """Each sample's index with a random generator of its own."""
    stream = SPLITS.index(split) * len(KINDS) + KINDS.index(kind)
    for index in range(num_samples):
        yield index, np.random.default_rng((seed, stream, index))


@functools.lru_cache(maxsize=256)
def load_font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """One of matplotlib's fonts at a size in pixels."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise DataError("the generators need the fonts of matplotlib: pip install 'alignvlm[quickstart]'") from error

    path = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return ImageFont.truetype(path, size, layout_engine=ImageFont.Layout.BASIC)


def pick_font(rng: np.random.Generator, split: str, low: int, high: int) -> ImageFont.FreeTypeFont:
    """A font of the split, `low` to `high` pixels high (both included)."""
    names = FONTS[split]
    return load_font(names[rng.integers(len(names))], int(rng.integers(low, high + 1)))


def pick_digits(
    rng: np.random.Generator, split: str, narrowest: float, widest: float, tallest: int
) -> ImageFont.FreeTypeFont:
    """A font of the split whose digits are so many pixels wide, their spacing included; at most `tallest` pixels high.

    Fonts of one height differ by half in the width of their digits: how far a digit is from a number's end would depend
    on the font.
    """
    names = FONTS[split]
    name = names[rng.integers(len(names))]
    size = round(100 * rng.uniform(narrowest, widest) / load_font(name, 100).getlength("0"))
    return load_font(name, min(size, tallest))


def new_page(
    rng: np.random.Generator, width: int, height: int
) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int, int]]:
    """White to light grey or yellowish paper, its pen, and a dark ink colour."""
    shade = int(rng.integers(238, 256))
    page = Image.new("RGB", (width, height), (shade, shade, max(shade - int(rng.integers(0, 10)), 0)))
    ink = tuple(int(value) for value in rng.integers(0, 70, size=3))
    return page, ImageDraw.Draw(page), (ink[0], ink[1], ink[2])


def add_grain(rng: np.random.Generator, page: Image.Image) -> Image.Image:
    """Gaussian noise of at most GRAIN grey levels, as a scanner adds it."""
    strength = float(rng.uniform(0, GRAIN))
    pixels = np.asarray(page, dtype=np.float32)
    grain = rng.standard_normal(pixels.shape[:2], dtype=np.float32)[..., None] * strength
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


def choose_form(rng: np.random.Generator, weights: Mapping[str, float]) -> str:
    """A key, as often as its weight says."""
    bounds = np.cumsum(list(weights.values())) / sum(weights.values())
    return list(weights)[int(np.searchsorted(bounds, rng.random(), side="right"))]


def random_digits(rng: np.random.Generator, fewest: int, most: int) -> str:
    """A number of so many digits, all equally likely; it may begin with zeros."""
    return "".join(str(digit) for digit in rng.integers(0, 10, size=int(rng.integers(fewest, most + 1))))


def pick_questions(
    rng: np.random.Generator, questions: Sequence[tuple[str, str, str]], turns: int
) -> tuple[list[tuple[str, str]], str]:
    """At most `turns` of the questions (type, question, answer), in any order, and the type of the last one."""
    picked = [questions[int(at)] for at in rng.permutation(len(questions))[:turns]]
    return [(question, answer) for _, question, answer in picked], picked[-1][0]


def make_record(
    key: str, task: str, images: Sequence[Image.Image], turns: Sequence[tuple[str, str]], **meta: Any
) -> dict[str, Any]:
    """A chat record: all images in front of the first question; `answers` holds the last turn's answer."""
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(turns):
        placeholders = "<image>" * len(images) if number == 0 else ""
        messages.append({"role": "user", "content": placeholders + question})
        messages.append({"role": "assistant", "content": answer})
    return {"key": key, "messages": messages, "images": list(images), "task": task, "answers": [turns[-1][1]], **meta}
