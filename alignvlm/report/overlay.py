"""A vocabulary view (vocabulary_view.py) laid over its image, and drawn there as inline SVG. Needs no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

SHOWN_WIDTH = 640.0
"""Width of the drawing in its own units; text sizes refer to it."""
LONGEST_TEXT = 9
LARGEST_FONT = 32.0


@dataclass(frozen=True)
class Cell:
    """One visual token in its place; lengths are in units of the drawing."""

    x: float
    y: float
    width: float
    height: float
    row: int
    """Row of the visual token over all tiles, from 0."""
    column: int
    label: str
    """Text of the strongest token, cut to what fits."""
    font: float
    """Size of the label."""
    fill: float
    """Opacities of area and frame: the stronger the token, the stronger they are."""
    frame: float
    top: list[list[Any]]
    """The strongest tokens: text, weight."""
    entropy: float
    """Entropy of the token's distribution, in nats."""


def place_cells(view: dict[str, Any], size: tuple[int, int]) -> list[Cell]:
    """The visual tokens of a view on a drawing of width SHOWN_WIDTH of an image of `size` (width, height).

    Those without content beneath (margins of the tiling) are left out.
    """
    width, height = SHOWN_WIDTH, shown_height(size)
    placed = []
    for tile in view["tiles"]:
        x0, y0, x1, y1 = (v * s for v, s in zip(tile["box"], (width, height, width, height), strict=True))
        side = tile["side"]
        cell_width, cell_height = (x1 - x0) / side, (y1 - y0) / side
        for number, cell in enumerate(tile["cells"]):
            x, y = x0 + number % side * cell_width, y0 + number // side * cell_height
            if x < width - 1 and y < height - 1 and x + cell_width > 1 and y + cell_height > 1:
                placed.append((cell, x, y, cell_width, cell_height))
    columns = _numbers(x for _, x, *_ in placed)
    rows = _numbers(y for _, _, y, *_ in placed)
    return [_cell(cell, x, y, w, h, rows[round(y, 1)], columns[round(x, 1)]) for cell, x, y, w, h in placed]


def shown_height(size: tuple[int, int]) -> float:
    """Height of the drawing of an image of `size` (width, height)."""
    return SHOWN_WIDTH * size[1] / size[0]


def draw_view(view: dict[str, Any], image_uri: str, size: tuple[int, int]) -> Markup:
    """The image with every visual token's strongest vocabulary token in its place; all k in the tooltip."""
    width, height = SHOWN_WIDTH, shown_height(size)
    cells = "".join(map(_draw, place_cells(view, size)))
    return Markup(
        f'<svg class="overlay" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="Top token of every patch">'
        f'<image href="{image_uri}" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none"/>'
        f'<rect class="veil" width="{width:.1f}" height="{height:.1f}"/>{cells}</svg>'
    )


def _numbers(starts: Iterable[float]) -> dict[float, int]:
    """Where rows or columns begin, in tenths -> which they are; neighbouring tiles may differ in the last digits."""
    return {start: number for number, start in enumerate(sorted({round(start, 1) for start in starts}))}


def _cell(cell: dict[str, Any], x: float, y: float, width: float, height: float, row: int, column: int) -> Cell:
    text, weight = cell["top"][0]
    label = text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
    font = min(0.36 * height, 1.5 * width / len(label), LARGEST_FONT)
    fill, frame = 0.05 + 0.5 * weight, 0.15 + 0.6 * weight
    return Cell(x, y, width, height, row, column, label, font, fill, frame, cell["top"], cell["entropy"])


def _draw(cell: Cell) -> str:
    title = "\n".join(f"{t}  {100 * p:.1f} %" for t, p in cell.top) + f"\nentropy {cell.entropy:.2f} nats"
    return (
        f'<g class="cell"><title>{escape(title)}</title>'
        f'<rect x="{cell.x + 0.5:.1f}" y="{cell.y + 0.5:.1f}" width="{cell.width - 1:.1f}" '
        f'height="{cell.height - 1:.1f}" style="fill-opacity:{cell.fill:.2f};stroke-opacity:{cell.frame:.2f}"/>'
        f'<text x="{cell.x + cell.width / 2:.1f}" y="{cell.y + cell.height / 2 + 0.35 * cell.font:.1f}" '
        f'font-size="{cell.font:.1f}">{escape(cell.label)}</text></g>'
    )
