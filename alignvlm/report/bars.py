"""The page's section on a run's wall clock: one bar for all of it, one for each attempt."""

from __future__ import annotations

from dataclasses import dataclass

from alignvlm.report.charts import format_duration
from alignvlm.report.goodput import PARTS
from alignvlm.report.run_data import RunData

COLOURS = {
    "steps": 0, "data_wait": 1, "start_up": 3, "retaken": 10, "save": 4, "evaluation": 2, "waiting": 5, "unknown": 6,
}  # fmt: skip
"""Part -> its number in the palette."""
MAX_BARS = 30
"""Attempts that the page shows, the last ones."""


@dataclass(frozen=True)
class Bar:
    """A span of time and its parts."""

    label: str
    parts: list[tuple[int, float, str]]
    """(number in the palette, percent of the span, what it is and how long)."""
    length: str
    note: str


@dataclass(frozen=True)
class TimeSection:
    """What the section shows."""

    ettr: float
    """As a fraction."""
    keys: list[tuple[int, str, str]]
    """(number in the palette, part, how long) of the parts that there are."""
    bars: list[Bar]
    left_out: int
    """Attempts before those shown."""


def time_of(run: RunData) -> TimeSection | None:
    """The section of a run; None when nothing says when it trained."""
    found = run.goodput
    if found is None or not found.wall:
        return None
    keys = [(COLOURS[part], PARTS[part], format_duration(seconds)) for part, seconds in found.parts.items() if seconds]
    shown = found.attempts[-MAX_BARS:]
    left_out = len(found.attempts) - len(shown)
    bars = [Bar("all", _shares(found.parts, found.wall), format_duration(found.wall), f"ETTR {100 * found.ettr:.1f} %")]
    for number, attempt in enumerate(shown, left_out + 1):
        note = f"{attempt.end} on {attempt.host}" if attempt.host else attempt.end
        bars.append(Bar(str(number), _shares(attempt.parts, attempt.wall), format_duration(attempt.wall), note))
    return TimeSection(found.ettr, keys, bars, left_out)


def _shares(parts: dict[str, float], wall: float) -> list[tuple[int, float, str]]:
    return [
        (COLOURS[part], 100 * seconds / wall, f"{PARTS[part]}: {format_duration(seconds)}")
        for part, seconds in parts.items()
        if seconds and wall
    ]
