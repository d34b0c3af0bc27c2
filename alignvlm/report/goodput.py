"""Where the wall clock of a run went: effective training time (ETTR) and its losses, over all attempts.

An attempt is one start of the job. `timeline.jsonl` says at what rank 0 was, `metrics.jsonl` and `lost_steps.jsonl`
when it took which step. Times are whole microseconds inside, so that the parts add up to the wall clock exactly.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.report.charts import format_duration
from alignvlm.run_folder import METRICS_LINE, TIMELINE_LINE, RunFolder, checkpoint_step
from alignvlm.system import lease
from data_pipeline.files import read_json_lines

log = logging.getLogger(__name__)
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
        return _parts(self.sections)

    @property
    def wall(self) -> float:
        """Seconds from its start to its end."""
        return (self.ended - self.began) / MICRO

    @property
    def ettr(self) -> float:
        """The part of `wall` in steps that count."""
        return self.parts["steps"] / self.wall if self.wall else 0.0


@dataclass(frozen=True)
class Goodput:
    """The wall clock of a run from its first start to its last sign of life, without times when it was finished."""

    attempts: list[Attempt]

    @property
    def sections(self) -> dict[str, float]:
        """Section -> seconds, over all attempts, in the order of `PARTS`."""
        total = sum((attempt.sections for attempt in self.attempts), Counter(waiting=self._waited))
        order = {part: number for number, part in enumerate(PARTS)}
        named = sorted(total, key=lambda name: order[_part_of(name)])
        return {name: total[name] / MICRO for name in named if total[name]}

    @property
    def parts(self) -> dict[str, float]:
        """Part of `PARTS` -> seconds; they add up to `wall`."""
        return _parts(sum((attempt.sections for attempt in self.attempts), Counter(waiting=self._waited)))

    @property
    def wall(self) -> float:
        """Seconds."""
        return (sum(attempt.ended - attempt.began for attempt in self.attempts) + self._waited) / MICRO

    @property
    def ettr(self) -> float:
        """Effective training time ratio: seconds of steps that count, without their wait for data, per second."""
        return self.parts["steps"] / self.wall if self.wall else 0.0

    @property
    def _waited(self) -> int:
        return sum(attempt.waited for attempt in self.attempts)

    def to_json(self) -> dict[str, Any]:
        """What `alignvlm goodput --json` prints and results.json holds; all times in seconds."""
        return {
            "ettr": self.ettr,
            "wall_seconds": self.wall,
            "seconds": self.parts,
            "sections": self.sections,
            "attempts": [
                {
                    "began": datetime.fromtimestamp(attempt.began / MICRO, UTC).isoformat(timespec="seconds"),
                    "host": attempt.host,
                    "end": attempt.end,
                    "waited_before": attempt.waited / MICRO,
                    "wall_seconds": attempt.wall,
                    "seconds": attempt.parts,
                }
                for attempt in self.attempts
            ],
        }


def table(found: Goodput) -> str:
    """The goodput as text: the ratio, every part with its sections, every attempt."""
    parts, sections = found.parts, found.sections
    total = f"{format_duration(parts['steps'])} of {PARTS['steps']} in {format_duration(found.wall)}"
    count = len(found.attempts)
    lines = [f"ETTR {100 * found.ettr:.1f} %: {total}, {count} attempt{'s' if count > 1 else ''}", ""]
    for part, title in PARTS.items():
        inside = [f"{name} {format_duration(sections[name])}" for name in sections if PART_OF.get(name) == part]
        details = f"   {', '.join(inside)}" if len(inside) > 1 else ""
        share = 100 * parts[part] / found.wall if found.wall else 0.0
        lines.append(f"  {title:27}{format_duration(parts[part]):>14}{share:>8.1f} %{details}")
    width = max(16, *(len(each.host) for each in found.attempts))
    lines += ["", f"  attempt  began (UTC)          {'host':{width}}  end       wall clock        waited   ETTR"]
    for number, each in enumerate(found.attempts, 1):
        began = datetime.fromtimestamp(each.began / MICRO, UTC).strftime("%Y-%m-%d %H:%M:%S")
        waited = format_duration(each.waited / MICRO)
        lines.append(
            f"  {number:>7}  {began}  {each.host:{width}}  {each.end:8}{format_duration(each.wall):>12}{waited:>14}"
            f"{100 * each.ettr:>6.1f} %"
        )
    return "\n".join(lines)


def read_goodput(folder: str | Path) -> Goodput:
    """The goodput of a run folder, finished or not. Runs of versions without a timeline are mostly `unknown`.

    What the files evidently lack is a warning each.

    Raises:
        UserError: there is no such folder, or nothing in it says when a step or a start was.
    """
    run = RunFolder(folder)
    run.must_exist()
    metrics = _lines(run, run.metrics, METRICS_LINE)
    found = goodput_of(run, metrics)
    if found is None:
        raise UserError(f"{run.path}: neither {run.timeline.name} nor {run.metrics.name} says when it trained")
    for lack in _lacks(run, metrics):
        log.warning("%s: what is not there counts as unknown, or not at all", lack)
    return found


def _lacks(run: RunFolder, metrics: list[dict[str, Any]]) -> Iterator[str]:
    """What was lost of the files, as far as they or the checkpoints tell."""
    if not run.has_file(run.timeline):
        yield f"{run.timeline} is missing"
    for path in filter(run.has_file, (run.timeline, run.metrics)):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 1))
            if file.read() not in (b"", b"\n"):
                yield f"the last line of {path} was cut off, or is being written"
    for stage in run.stages():
        kept = max(map(checkpoint_step, stage.checkpoint_folders()), default=0)
        steps = max((line["step"] for line in metrics if line["stage"] == stage.name), default=0)
        if steps < kept:
            yield f"{run.metrics} ends at step {steps} of stage {stage.name}, which has a checkpoint of step {kept}"


def goodput_of(run: RunFolder, metrics: Iterable[dict[str, Any]]) -> Goodput | None:
    """The goodput of a run with these lines of metrics.jsonl; None when nothing says when it trained."""
    beats = [path.stat().st_mtime for path in run.path.glob("lease-*.json") if lease.NAME.fullmatch(path.name)]
    lost = _lines(run, run.lost_steps, METRICS_LINE)
    found = measure(_lines(run, run.timeline, TIMELINE_LINE), metrics, lost, beats)
    return found if found.attempts else None


def measure(
    timeline: Sequence[dict[str, Any]],
    metrics: Iterable[dict[str, Any]],
    lost: Iterable[dict[str, Any]],
    beats: Iterable[float] = (),
) -> Goodput:
    """The goodput from the lines of the three files, and the lease's last beats, in seconds since 1970."""
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
    return Goodput(attempts)


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


def _part_of(section: str) -> str:
    return PART_OF.get(section, section)


def _parts(sections: Counter[str]) -> dict[str, float]:
    parts = Counter(dict.fromkeys(PARTS, 0))
    for name, time in sections.items():
        parts[_part_of(name)] += time
    return {name: time / MICRO for name, time in parts.items()}


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < MAX_SECONDS


def _micro(seconds: float) -> int:
    return round(seconds * MICRO)


def _lines(run: RunFolder, path: Path, shape: Any) -> list[dict[str, Any]]:
    """Lines of a file of the run; none while it does not exist."""
    return read_json_lines(path, shape) if run.has_file(path) else []
