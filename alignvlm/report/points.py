"""Line charts over any quantity, such as a score over the size of noise, as inline SVG like those over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from alignvlm.report.charts import BOTTOM, HEIGHT, LEFT, PALETTE, RIGHT, WIDTH, axis, format_number, grid, path, scale


@dataclass(frozen=True)
class Points:
    """What to draw."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    """Name -> (x, y) in the order of x."""
    note: str = ""
    """What the horizontal axis is."""
    log_x: bool = False
    zero: bool = False
    """The vertical axis starts at zero."""


def draw_points(chart: Points) -> Markup | None:
    """A `<figure>`; None without any point."""
    lines = {name: points for name, points in chart.lines.items() if points}
    if not lines:
        return None
    y_of, y_ticks = axis([y for points in lines.values() for _, y in points], False, chart.zero)
    place, x_ticks = scale([x for points in lines.values() for x, _ in points], chart.log_x, not chart.log_x)
    x_of = lambda x: LEFT + place(x) * (WIDTH - LEFT - RIGHT)
    body = [grid(y_ticks, y_of)]
    for tick in x_ticks:
        text = f'<text class="tick" x="{x_of(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
        body.append(f"{text}{format_number(tick)}</text>")
    for colour, (name, points) in enumerate(lines.items()):
        body.append(path(list(points), x_of, y_of, f"line c{colour % PALETTE}"))
        body += [
            f'<circle class="line c{colour % PALETTE}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.5">'
            f"<title>{escape(name)}: {format_number(x)}, {format_number(y)}</title></circle>"
            for x, y in points
        ]
    keys = [f'<span class="key c{colour % PALETTE}">{escape(name)}</span>' for colour, name in enumerate(lines)]
    note = f'<span class="note">{escape(chart.note)}</span>' if chart.note else ""
    return Markup(
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b>{note}{"".join(keys)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">{"".join(body)}</svg>'
        "</figure>"
    )
