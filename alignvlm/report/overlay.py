"""A vocabulary view (vocabulary_view.py) drawn over its image as inline SVG. Needs no model."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup, escape

SHOWN_WIDTH = 640.0
"""Width of the drawing in its own units; text sizes refer to it."""
LONGEST_TEXT = 9


def draw_view(view: dict[str, Any], image_uri: str, size: tuple[int, int]) -> Markup:
    """The image with every visual token's strongest vocabulary token in its place; all k in the tooltip.

    Cells without content beneath (margins of the tiling) are left out. The stronger the token, the stronger its frame.
    """
    width, height = SHOWN_WIDTH, SHOWN_WIDTH * size[1] / size[0]
    cells = []
    for tile in view["tiles"]:
        x0, y0, x1, y1 = (v * s for v, s in zip(tile["box"], (width, height, width, height), strict=True))
        side = tile["side"]
        cell_width, cell_height = (x1 - x0) / side, (y1 - y0) / side
        for number, cell in enumerate(tile["cells"]):
            x, y = x0 + number % side * cell_width, y0 + number // side * cell_height
            if x < width - 1 and y < height - 1 and x + cell_width > 1 and y + cell_height > 1:
                cells.append(_cell(cell, x, y, cell_width, cell_height))
    return Markup(
        f'<svg class="overlay" viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="Top token of every patch">'
        f'<image href="{image_uri}" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none"/>'
        f'<rect class="veil" width="{width:.1f}" height="{height:.1f}"/>{"".join(cells)}</svg>'
    )


def _cell(cell: dict[str, Any], x: float, y: float, width: float, height: float) -> str:
    text, probability = cell["top"][0]
    shown = text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"
    font = min(0.36 * height, 1.5 * width / len(shown))
    title = "\n".join(f"{t}  {100 * p:.1f} %" for t, p in cell["top"]) + f"\nentropy {cell['entropy']:.2f} nats"
    return (
        f'<g class="cell"><title>{escape(title)}</title>'
        f'<rect x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}" '
        f'style="fill-opacity:{0.05 + 0.5 * probability:.2f};stroke-opacity:{0.15 + 0.6 * probability:.2f}"/>'
        f'<text x="{x + width / 2:.1f}" y="{y + height / 2 + 0.35 * font:.1f}" font-size="{font:.1f}">'
        f"{escape(shown)}</text></g>"
    )
