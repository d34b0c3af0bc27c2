"""Scores of stored replies: no model, no data. What a rank wrote, a file of another run, or a merged one."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignvlm.errors import UserError
from alignvlm.evaluation.benchmarks.base import Benchmark, Scores
from alignvlm.metrics.bootstrap import confidence_interval
from data_pipeline.files import has_shape

ROW = {"index": int, "id": str, "reply": str, "gold": dict}
"""What a line of stored replies has at least."""


def read_replies(path: Path) -> list[dict[str, Any]]:
    """Stored replies in order. Raises UserError for a file that holds something else, nothing, or one reply twice."""
    rows: dict[int, dict[str, Any]] = {}
    try:
        with path.open(encoding="utf-8") as stream:  # not splitlines, which also ends a line at U+2028
            lines = list(stream)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason})") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a stored reply ({error})") from error
        if not has_shape(row, ROW):
            needed = ", ".join(f"{name} ({kind.__name__})" for name, kind in ROW.items())
            raise UserError(f"{path}, line {number}: not a stored reply; it has {needed}")
        if rows.setdefault(row["index"], row) is not row:
            raise UserError(f"{path}, line {number}: a second reply of index {row['index']}")
    if not rows:
        raise UserError(f"{path}: there are no replies in it")
    return [rows[index] for index in sorted(rows)]


def score_rows(benchmark: Benchmark, rows: Sequence[Mapping[str, Any]], flavour: str) -> dict[str, Any]:
    """Scores in percent of all rows, with the headline's 95 % interval by bootstrap over the benchmark's units.

    Returns:
        `score` (the headline), `headline` (its name), `interval` ([low, high]), `scores` (all by name), `items`,
        `units`, `notes`. Without rows every score is 0. A benchmark that has not been judged has no score: None.

    Raises:
        UserError: a row is of another benchmark.
    """
    try:
        units = benchmark.units(rows, flavour)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"these replies are not of benchmark {benchmark.name!r} ({type(error).__name__}: {error})"
        ) from error
    scores = {name: 100.0 * float(value) for name, value in _scores(benchmark, units).items()}
    is_scored = benchmark.headline in scores or not benchmark.judged
    return {
        "score": scores.get(benchmark.headline, 0.0) if is_scored else None,
        "headline": benchmark.headline,
        "interval": _interval(benchmark, units) if scores else [0.0, 0.0],
        "scores": scores,
        "items": len(rows),
        "units": len(units),
        "notes": benchmark.notes(rows),
    }


def add_judge(benchmark: Benchmark, rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """The rows with a judge's scores among their references.

    Args:
        path: a JSON object, id -> score from 0 to 1, or the official judge's file, id -> {"score": [one per run]}.

    Raises:
        UserError: the benchmark is scored without a judge, the file is none, or a reply has no score in it.
    """
    if not benchmark.judged:
        raise UserError(f"{path}: {benchmark.name} is scored without a judge; leave --judge out")
    try:
        scores = {str(id): _judged(score) for id, score in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f'{path}: must be a JSON object {{"id": score}} ({error})') from error
    for row in rows:
        if not 0.0 <= scores.get(row["id"], -1.0) <= 1.0:
            raise UserError(f"{path}: no score from 0 to 1 for the reply {row['id']!r}")
    return [{**row, "gold": {**row["gold"], "judge": scores[row["id"]]}} for row in rows]


def _judged(score: Any) -> float:
    """A score as it stands, or the mean of a judge's runs."""
    return statistics.fmean(map(float, score["score"])) if isinstance(score, dict) else float(score)


def _scores(benchmark: Benchmark, units: Sequence[Scores]) -> dict[str, Any]:
    if not any(units):
        return {}
    above, below = ({name: math.fsum(u[name][i] for u in units if name in u) for name in _names(units)} for i in (0, 1))
    return benchmark.combine({name: above[name] / below[name] if below[name] else 0.0 for name in above})


def _interval(benchmark: Benchmark, units: Sequence[Scores]) -> list[float]:
    import numpy as np

    names = _names(units)
    parts = np.array([[side for name in names for side in unit.get(name, (0.0, 0.0))] for unit in units], dtype=float)

    def headline(sums: np.ndarray) -> np.ndarray:
        above, below = sums[:, 0::2], sums[:, 1::2]
        rates = above / np.where(below == 0, 1.0, below)
        return benchmark.combine({name: rates[:, i] for i, name in enumerate(names)})[benchmark.headline]

    return [100.0 * limit for limit in confidence_interval(parts, headline)]


def _names(units: Iterable[Scores]) -> list[str]:
    """Names of all scores, in the order of their first appearance."""
    return list(dict.fromkeys(name for unit in units for name in unit))
