"""The attempts of a run and their parts, to the microsecond, from the files that its jobs have written.

An attempt is one start of the job. `timeline.jsonl` says what rank 0 was doing, `metrics.jsonl` and `lost_steps.jsonl`
when it took which step. Times are whole microseconds, so that the parts add up to the wall clock exactly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise
from typing import Any

PARTS = {
    "steps": "steps that count",
    "data_wait": "waiting for data",
    "start_up": "start-up",
    "retaken": "steps taken again",
    "save": "checkpoint stalls",
    "evaluation": "evaluation, export, report",
    "waiting": "between attempts",
    "unknown": "unknown",
}
"""Part of the wall clock -> what it is called."""
PART_OF: dict[str, str] = {
    "imports": "start_up", "prepare": "start_up", "rendezvous": "start_up", "engine": "start_up", "load": "start_up",
    "save": "save",
    "evaluation": "evaluation", "export": "evaluation", "report": "evaluation", "delivery": "evaluation",
}  # fmt: skip
"""Section of `system.timeline` -> the part it belongs to; steps are parts of their own."""
MICRO = 1_000_000
MAX_SECONDS = 1e11
"""A time beyond this is none."""


@dataclass(frozen=True)
class Step:
    """When a step was taken, in microseconds since 1970."""

    began: int
    ended: int
    data_wait: int
    """How long of it, from `began` on, the step waited for data."""
    counts: bool
    """False for a step that was taken again later."""


@dataclass(frozen=True)
class Attempt:
    """One start of the job; times in microseconds."""

    began: int
    ended: int
    """Its end, or the last sign of life of a job that was killed or still runs."""
    end: str
    """`finished`, `stopped` (a signal, an error), `killed`, or `open`: killed or running, nothing has come after it;
    `unknown`: of a version without a timeline."""
    waited: int
    """Time between the end of the attempt before and `began`."""
    host: str
    sections: Counter[str]
    """Section of the timeline, or part of the time of steps -> microseconds; they add up to the attempt's time."""

    @property
    def parts(self) -> dict[str, float]:
        """Part of `PARTS` -> seconds, without the wait before the attempt."""
        return parts_of(self.sections)

    @property
    def wall(self) -> float:
        """Seconds from its start to its end."""
        return (self.ended - self.began) / MICRO

    @property
    def ettr(self) -> float:
        """The part of `wall` in steps that count."""
        return self.parts["steps"] / self.wall if self.wall else 0.0


def attempts_of(
    timeline: Sequence[dict[str, Any]],
    metrics: Iterable[dict[str, Any]],
    lost: Iterable[dict[str, Any]],
    beats: Iterable[float],
) -> list[Attempt]:
    """The attempts by the lines of the three files, and the lease's last beats, in seconds since 1970."""
    steps = _steps(metrics, lost)
    events = [(_micro(line["time"]), line) for line in timeline if _is_time(line["time"])]
    starts = [number for number, (_, line) in enumerate(events) if line["section"] == "imports"]
    attempts: list[Attempt] = []
    first = events[starts[0]][0] if starts else None
    early = steps[: None if first is None else _after(steps, first)]
    if early:  # taken by a version without a timeline
        attempts.append(_attempt([(early[0].began, "unknown"), (early[-1].ended, "end")], early, None, "unknown", ""))
    for number, start in enumerate(starts):
        end = starts[number + 1] if number + 1 < len(starts) else len(events)
        mine = events[start:end]
        after = events[end] if end < len(events) else None
        seen: list[Any] = list(beats) if after is None else [after[1].get("last_beat")]
        limit = after[0] if after is not None else None
        alive = [_micro(beat) for beat in seen if _is_time(beat)]
        attempts.append(_of_timeline(mine, steps, alive, limit, attempts[-1] if attempts else None))
    return attempts


def _of_timeline(
    events: list[tuple[int, dict[str, Any]]],
    steps: list[Step],
    beats: list[int],
    limit: int | None,
    before: Attempt | None,
) -> Attempt:
    """The attempt of one job's lines in the timeline, of which `limit` is when the next one began."""
    began, facts = events[0]
    if before is not None:
        began = max(began, before.ended)  # hosts' clocks differ
    taken = steps[_after(steps, began) : None if limit is None else _after(steps, limit)]
    # A clock that was set back stands still until it is where it was.
    moments = accumulate((moment for moment, _ in events), max, initial=began)
    marks = [(moment, line["section"]) for moment, (_, line) in zip(islice(moments, 1, None), events, strict=True)]
    last = events[-1][1]
    if last["section"] == "end":
        end = "finished" if last.get("finished") else "stopped"
    else:
        end = "open" if limit is None else "killed"
        alive = max([marks[-1][0], *(step.ended for step in taken), *(b for b in beats if limit is None or b <= limit)])
        marks.append((alive, "end"))
    return _attempt(marks, taken, before, end, str(facts.get("host") or ""))


def _attempt(marks: list[tuple[int, str]], steps: list[Step], before: Attempt | None, end: str, host: str) -> Attempt:
    """The sections between marks, which are in order, with the time of steps split up."""
    sections: Counter[str] = Counter()
    for (began, section), (ended, following) in pairwise(marks):
        if section not in ("steps", "unknown"):
            sections[section if section in PART_OF else "unknown"] += max(0, ended - began)
            continue
        # The step under way when a job was killed is taken again.
        left = "retaken" if end == "killed" and following == "end" else "unknown"
        sections += _of_steps(began, max(began, ended), steps, left)
    waited = 0 if before is None or before.end == "finished" else marks[0][0] - before.ended
    return Attempt(marks[0][0], max(marks[0][0], marks[-1][0]), end, waited, host, sections)


def _of_steps(began: int, ended: int, steps: list[Step], left: str) -> Counter[str]:
    """The time from `began` to `ended`, in which these steps were taken one after the other; `left` is what follows."""
    found: Counter[str] = Counter()
    at = began
    for step in steps[_after(steps, began) :]:
        if step.began >= ended:
            break
        start = max(at, step.began)
        end = max(start, min(step.ended, ended))
        found["unknown"] += start - at
        waited = min(step.data_wait, end - start) if step.counts else 0
        found["data_wait"] += waited
        found["steps" if step.counts else "retaken"] += end - start - waited
        at = end
    found[left] += ended - at
    return found


def _steps(metrics: Iterable[dict[str, Any]], lost: Iterable[dict[str, Any]]) -> list[Step]:
    """All steps that were taken, in the order of their ends. Of two of the same number the later one counts."""
    rows: dict[tuple[str, int], list[Step]] = {}
    for counts, lines in ((False, lost), (True, metrics)):
        for line in lines:
            is_whole = all(_is_time(line.get(key)) for key in ("time", "seconds", "data_wait"))
            if is_whole and line["seconds"] <= line["time"]:
                ended = _micro(line["time"])
                step = Step(ended - _micro(line["seconds"]), ended, _micro(line["data_wait"]), counts)
                rows.setdefault((line["stage"], line["step"]), []).append(step)
    taken = [replace(step, counts=step.counts and step is same[-1]) for same in rows.values() for step in same]
    return sorted(taken, key=lambda step: step.ended)


def _after(steps: list[Step], moment: int) -> int:
    """How many of the steps, which are in order, ended until then."""
    return bisect_right(steps, moment, key=lambda step: step.ended)


def part_of(section: str) -> str:
    """The part of `PARTS` that a section belongs to."""
    return PART_OF.get(section, section)


def parts_of(sections: Counter[str]) -> dict[str, float]:
    """Part of `PARTS` -> seconds, from microseconds by section."""
    parts = Counter(dict.fromkeys(PARTS, 0))
    for name, time in sections.items():
        parts[part_of(name)] += time
    return {name: time / MICRO for name, time in parts.items()}


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < MAX_SECONDS


def _micro(seconds: float) -> int:
    return round(seconds * MICRO)
