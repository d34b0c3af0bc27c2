"""What the generators share: seeds, splits, fonts, paper, and the shape of a record. Nothing about digits or tables."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
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


def check_common(split: str, num_samples: int, seed: int, kind: str, size: int) -> None:
    """Raise DataError for arguments of every generator that are out of range."""
    if split not in SPLITS:
        raise ArgumentError(f"split {split!r}: one of {', '.join(SPLITS)}", "split")
    if kind not in KINDS:
        raise ArgumentError(f"kind {kind!r}: one of {', '.join(KINDS)}", "kind")
    for name, value, least, most in (
        ("num_samples", num_samples, 0, MAX_SAMPLES),
        ("seed", seed, 0, 2**63 - 1),
        ("size", size, *SIDES),
    ):
        if not least <= value <= most:
            raise ArgumentError(f"{name} {value}: from {least:,} to {most:,}", name)


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


def new_page(
    rng: np.random.Generator, width: int, height: int
) -> tuple[Image.Image, ImageDraw.ImageDraw, tuple[int, int, int]]:
    """White to light grey or yellowish paper, its pen, and a dark ink colour."""
    shade = int(rng.integers(238, 256))
    page = Image.new("RGB", (width, height), (shade, shade, max(shade - int(rng.integers(0, 10)), 0)))
    ink = tuple(int(value) for value in rng.integers(0, 70, size=3))
    return page, ImageDraw.Draw(page), (ink[0], ink[1], ink[2])


def add_grain(rng: np.random.Generator, page: Image.Image, strength: float) -> Image.Image:
    """Gaussian noise of `strength` grey levels, as a scanner adds it."""
    pixels = np.asarray(page, dtype=np.float32)
    grain = rng.standard_normal(pixels.shape[:2], dtype=np.float32)[..., None] * strength
    return Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8))


def choose(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    """One of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


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
