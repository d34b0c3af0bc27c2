"""Scores of a task's predictions by the task's metrics, and of a constant answer over the whole task."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from alignvlm.metrics import Metric, find_metric, metric_names
from alignvlm.metrics.exact_match import normalise
from data_pipeline.files import has_shape

ENTRY = {"items": int, "baseline": float, "unreadable?": int, "metrics?": {str: {"title": str, "note": str}}}
"""What every task's entry of results.json has, besides a score by each of its metrics."""


class Baseline(NamedTuple):
    """The most frequent answer, and its scores if it were given to every item."""

    answer: str
    scores: dict[str, float]


def score(metrics: Sequence[Metric], prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """One prediction's score by every metric, in [0, 1]."""
    return {metric.name: metric(prediction, answers) for metric in metrics}


def mean_scores(metrics: Sequence[Metric], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means over rows that hold scores (order-independent sums); all zero when there is no row."""
    return {m.name: math.fsum(row[m.name] for row in rows) / max(len(rows), 1) for m in metrics}


def most_frequent_answer(metrics: Sequence[Metric], answer_lists: Sequence[Sequence[str]]) -> Baseline:
    """The answer with the best exact match if it were given to every item; ties go to the first seen.

    It knows the evaluated answers, so it is the best that a model blind to images and questions can reach.
    """
    frequency: Counter[str] = Counter()
    spelling: dict[str, str] = {}
    for answers in answer_lists:
        for answer in answers:
            spelling.setdefault(normalise(answer), answer)
        frequency.update(dict.fromkeys(map(normalise, answers)).keys())
    if not frequency:
        return Baseline("", mean_scores(metrics, []))
    constant = spelling[frequency.most_common(1)[0][0]]
    distinct = {tuple(answers): answers for answers in answer_lists}
    scores = {key: score(metrics, constant, answers) for key, answers in distinct.items()}
    return Baseline(constant, mean_scores(metrics, [scores[tuple(answers)] for answers in answer_lists]))


def task_scores(metrics: Sequence[Metric], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What results.json says about the predictions of a task: means, the baseline, and how to present each metric.

    `baseline` is the constant answer's score by the task's first metric, `baseline_<name>` by each of the others.
    """
    baseline = most_frequent_answer(metrics, [row["answers"] for row in rows])
    first, *others = (metric.name for metric in metrics)
    return {
        **mean_scores(metrics, rows),
        "items": len(rows),
        "baseline": baseline.scores[first],
        "baseline_answer": baseline.answer,
        **{f"baseline_{name}": baseline.scores[name] for name in others},
        "metrics": {metric.name: _presentation(metric) for metric in metrics},
    }


def metrics_of(entry: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Name -> title and note of the metrics in a task's entry of results.json, the task's first metric first.

    Entries of evaluation version 1 do not name them: they hold metrics of this package.
    """
    if entry.get("metrics") is not None:
        return entry["metrics"]
    return {name: _presentation(find_metric(name)) for name in metric_names() if name in entry}


def is_entry(value: Any) -> bool:
    """Whether JSON data is a task's entry of results.json."""
    if not has_shape(value, ENTRY):
        return False
    metrics = metrics_of(value)
    return bool(metrics) and has_shape(value, dict.fromkeys(metrics, float))


def baseline_of(entry: Mapping[str, Any], metric: str) -> float | None:
    """The constant answer's score by a metric of the entry."""
    baseline = entry["baseline"] if metric == next(iter(metrics_of(entry))) else entry.get(f"baseline_{metric}")
    return baseline if has_shape(baseline, float) else None


def _presentation(metric: Metric) -> dict[str, str]:
    return {"title": metric.title, "note": metric.note}
