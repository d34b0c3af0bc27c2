"""The page's section on a run's wall clock: one bar for all of it, one for each attempt."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from alignvlm.report.attempts import PARTS
from alignvlm.report.charts import format_duration
from alignvlm.report.run_data import RunData
from data_pipeline.files import has_shape

COLOURS = {
    "steps": 0, "data_wait": 1, "start_up": 3, "retaken": 10, "save": 4, "evaluation": 2, "waiting": 5, "unknown": 6,
}  # fmt: skip
"""Part -> its number in the palette."""
MAX_BARS = 30
"""Attempts that the page shows, the last ones."""


KINDS = {
    "compute": "computing, s per step",
    "wait": "waiting for other ranks, s per step",
    "data": "waiting for data, s per step",
    "tiles": "image tiles per step",
    "tokens": "tokens per step",
}
"""Times and work of the ranks in metrics.jsonl -> what the page calls them."""


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
    """Effective training time ratio, as a fraction."""
    keys: list[tuple[int, str, str]]
    """(number in the palette, part, how long) of the parts that there are."""
    bars: list[Bar]
    left_out: int
    """Attempts before those shown."""
    ranks: list[RankRow]
    """How uneven the ranks were; [] with a single rank."""
    stragglers: list[tuple[str, int]]
    """(rank and node, lines of metrics.jsonl that name it), the most frequent first."""


@dataclass(frozen=True)
class RankRow:
    """One kind of time or work of the ranks, over the whole run."""

    title: str
    mean: float
    largest: float
    """Mean over the steps of the largest rank's value."""
    rank: int
    """Which rank was the largest most often."""
    share: float
    """In which share of the lines that rank was the largest."""


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
        # The job that finishes a run writes this page before it ends.
        end = "finished" if run.finished and attempt.end == "open" else attempt.end
        note = f"{end} on {attempt.host}" if attempt.host else end
        bars.append(Bar(str(number), _shares(attempt.parts, attempt.wall), format_duration(attempt.wall), note))
    rows = [row for kind, title in KINDS.items() if (row := _row(run, kind, title)) is not None]
    named = Counter(name for step in run.steps for name in step.get("stragglers") or () if isinstance(name, str))
    return TimeSection(found.ettr, keys, bars, left_out, rows, named.most_common())


def rank_times(step: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The ranks' times in a line of metrics.jsonl; {} where there are none."""
    ranks: Any = step.get("ranks")
    return dict(ranks) if has_shape(ranks, {str: {"mean": float, "max": float, "rank": int}}) else {}


def _row(run: RunData, kind: str, title: str) -> RankRow | None:
    lines = [times[kind] for step in run.steps if kind in (times := rank_times(step))]
    if not lines:
        return None
    (rank, count), *_ = Counter(line["rank"] for line in lines).most_common(1)
    mean, largest = (sum(line[which] for line in lines) / len(lines) for which in ("mean", "max"))
    return RankRow(title, mean, largest, int(rank), count / len(lines))


def _shares(parts: dict[str, float], wall: float) -> list[tuple[int, float, str]]:
    return [
        (COLOURS[part], 100 * seconds / wall, f"{PARTS[part]}: {format_duration(seconds)}")
        for part, seconds in parts.items()
        if seconds and wall
    ]
