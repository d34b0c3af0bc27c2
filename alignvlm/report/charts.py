"""Line charts of training steps as inline SVG. Colours come from the page's style sheet, for light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape

from data_pipeline.files import to_json

MAX_POINTS = 480
"""Points per series; more steps are averaged in groups."""
WIDTH, HEIGHT = 560, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 26, 26
PALETTE = 12
"""Colours of the style sheet, `c0` to `c11`."""
SMOOTHING = 0.8
"""Weight of the past in the smoothed line (exponential moving average, corrected for its start)."""

Value = Callable[[dict[str, Any]], Any]


@dataclass(frozen=True)
class Series:
    """One line of a chart: its name, its number in the palette, and its value at a step (None: no point)."""

    name: str
    colour: int
    value: Value
    exact: bool = False
    """Drawn as it is, also in a smooth chart: a value at few steps, each of which counts."""


@dataclass(frozen=True)
class Chart:
    """What to draw."""

    title: str
    series: list[Series]
    note: str = ""
    log: bool = False
    smooth: bool = False
    """Draw the raw values faintly and their moving average on top."""
    zero: bool = False
    """The axis starts at zero."""


def draw(chart: Chart, steps: Sequence[dict[str, Any]]) -> Markup | None:
    """A `<figure>` with the chart over all steps of a run, stage boundaries marked; None without any finite value."""
    segments = _segments(steps)
    lines = [
        (
            series,
            [_group([(x, finite(series.value(step))) for x, step in segment], len(steps)) for _, segment in segments],
        )
        for series in chart.series
    ]
    lines = [(s, parts) for s, parts in lines if any(parts)]
    values = [y for _, parts in lines for points in parts for _, y in points if not chart.log or y > 0]
    if not values:
        return None
    log = chart.log and min(values) > 0 and max(values) / min(values) > 20
    y_of, y_ticks = axis(values, log, chart.zero)
    x_of = lambda x: LEFT + (x - 0.5) / len(steps) * (WIDTH - LEFT - RIGHT)
    body = [grid(y_ticks, y_of), _stage_marks(segments, x_of, len(steps)), _x_ticks(len(steps), x_of)]
    for series, points_per_stage in lines:
        for points in points_per_stage:
            kept = [(x, y) for x, y in points if not chart.log or y > 0]
            smooth = chart.smooth and not series.exact
            if smooth:
                body.append(path(kept, x_of, y_of, f"raw c{series.colour}"))
            body.append(path(_smoothed(kept) if smooth else kept, x_of, y_of, f"line c{series.colour}"))
    return _figure(chart, lines, "".join(body), segments, len(steps))


def _figure(chart: Chart, lines: list[Any], body: str, segments: list[Any], num_steps: int) -> Markup:
    keys = [f'<span class="key c{s.colour}">{escape(s.name)}</span>' for s, _ in lines]
    legend = "".join(keys) if len(keys) > 1 else ""
    note = f'<span class="note">{escape(chart.note)}</span>' if chart.note else ""
    data = {
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "width": WIDTH,
        "steps": num_steps,
        "stages": [[name, points[0][0], points[0][1]["step"]] for name, points in segments],
        "series": [
            [s.name, s.colour, [[x, float(f"{y:.5g}")] for points in parts for x, y in points]] for s, parts in lines
        ],
    }
    return Markup(
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b>{note}{legend}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">{body}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg><div class="tip"></div>'
        f'<script type="application/json">{to_json(data).replace("<", chr(92) + "u003c")}</script></figure>'
    )


def _segments(steps: Sequence[dict[str, Any]]) -> list[tuple[str, list[tuple[int, dict[str, Any]]]]]:
    """Steps by stage, numbered from 1 over the whole run."""
    segments: list[tuple[str, list[tuple[int, dict[str, Any]]]]] = []
    for x, step in enumerate(steps, start=1):
        if not segments or segments[-1][0] != step["stage"]:
            segments.append((step["stage"], []))
        segments[-1][1].append((x, step))
    return segments


def finite(value: Any) -> float | None:
    """A number that can be drawn; None for anything else that a line of JSON may hold."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else None


def _group(points: list[tuple[int, float | None]], num_steps: int) -> list[tuple[float, float]]:
    """Means of neighbouring points, so that at most about MAX_POINTS stay of all stages' points."""
    present = [(x, y) for x, y in points if y is not None]
    size = max(1, math.ceil(len(present) / max(1, len(points)) * num_steps / MAX_POINTS))
    groups = [present[i : i + size] for i in range(0, len(present), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    average, weight, out = 0.0, 0.0, []
    for x, y in points:
        average = SMOOTHING * average + (1 - SMOOTHING) * y
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        out.append((x, average / weight))
    return out


def axis(values: list[float], log: bool, zero: bool) -> tuple[Callable[[float], float], list[float]]:
    """Value to y in pixels, and the ticks."""
    place, ticks = scale(values, log, zero)
    return lambda y: HEIGHT - BOTTOM - place(y) * (HEIGHT - TOP - BOTTOM), ticks


def scale(values: list[float], log: bool, zero: bool) -> tuple[Callable[[float], float], list[float]]:
    """Value to its place on an axis, from 0 to 1, and the ticks."""
    low, high = min(values), max(values)
    if log:
        exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        ticks = [m * 10.0**e for e in exponents for m in (1, 3)]
        low, high = math.log10(low), math.log10(high)
        transform = math.log10
    else:
        low = min(0.0, low) if zero else low
        if high - low <= abs(high) * 1e-9:
            low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
        step = _nice((high - low) / 4)
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
        ticks = [low + step * i for i in range(round((high - low) / step) + 1)]
        transform = float
    span = (high - low) or 1.0
    return lambda value: (transform(value) - low) / span, [
        t for t in ticks if low - 1e-9 * span <= transform(t) <= high + 1e-9 * span
    ]


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


def grid(ticks: list[float], y_of: Callable[[float], float]) -> str:
    """Horizontal lines with their numbers."""
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(t):.1f}" y2="{y_of(t):.1f}"/>'
        f'<text class="tick" x="{LEFT - 7}" y="{y_of(t) + 3.5:.1f}" text-anchor="end">{format_number(t)}</text>'
        for t in ticks
    )


def _stage_marks(segments: list[Any], x_of: Callable[[float], float], num_steps: int) -> str:
    marks = []
    for number, (name, points) in enumerate(segments):
        left, right = x_of(points[0][0] - 0.5), x_of(points[-1][0] + 0.5)
        if number:
            marks.append(f'<line class="boundary" x1="{left:.1f}" x2="{left:.1f}" y1="8" y2="{HEIGHT - BOTTOM}"/>')
        shown = str(name)[: max(1, int((right - left) / 6.2))]
        marks.append(f'<text class="stage" x="{left + 5:.1f}" y="17">{escape(shown)}</text>')
    return "".join(marks)


def _x_ticks(num_steps: int, x_of: Callable[[float], float]) -> str:
    step = max(1, round(_nice(num_steps / 5)))
    ticks = range(step, num_steps + 1, step)
    return "".join(
        f'<text class="tick" x="{x_of(t):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{t:,}</text>'
        for t in ticks
        if x_of(t) < WIDTH - RIGHT - 8
    )


def path(points: list[tuple[float, float]], x_of: Callable[[float], float], y_of: Any, css: str) -> str:
    """A line through points; one point alone is a dot."""
    if not points:
        return ""
    coordinates = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
    if len(points) == 1:
        x, y = coordinates.split(",")
        return f'<circle class="{css}" cx="{x}" cy="{y}" r="2"/>'
    return f'<polyline class="{css}" points="{coordinates}"/>'


def format_number(value: float) -> str:
    """A short number: 0.002, 3e-05, 12.5, 1.2K, 3M."""
    if value == 0:
        return "0"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")


def format_duration(seconds: float) -> str:
    """`42 s`, `7 min 05 s`, `3 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
