"""Where the wall clock of a run went: effective training time (ETTR) and its losses, over all attempts."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.report.attempts import MICRO, PART_OF, PARTS, Attempt, attempts_of, part_of, parts_of
from alignvlm.report.charts import format_duration
from alignvlm.run_folder import METRICS_LINE, TIMELINE_LINE, RunFolder, checkpoint_step
from alignvlm.system import lease
from data_pipeline.files import read_json_lines

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Goodput:
    """The wall clock of a run from its first start to its last sign of life, without times when it was finished."""

    attempts: list[Attempt]

    @property
    def sections(self) -> dict[str, float]:
        """Section -> seconds, over all attempts, in the order of `PARTS`."""
        total = sum((attempt.sections for attempt in self.attempts), Counter(waiting=self._waited))
        order = {part: number for number, part in enumerate(PARTS)}
        named = sorted(total, key=lambda name: order[part_of(name)])
        return {name: total[name] / MICRO for name in named if total[name]}

    @property
    def parts(self) -> dict[str, float]:
        """Part of `PARTS` -> seconds; they add up to `wall`."""
        return parts_of(sum((attempt.sections for attempt in self.attempts), Counter(waiting=self._waited)))

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
    found = Goodput(attempts_of(_lines(run, run.timeline, TIMELINE_LINE), metrics, lost, beats))
    return found if found.attempts else None


def _lines(run: RunFolder, path: Path, shape: Any) -> list[dict[str, Any]]:
    """Lines of a file of the run; none while it does not exist."""
    return read_json_lines(path, shape) if run.has_file(path) else []
