"""Metrics by name. `@register_metric` adds one, from this package or from any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from alignvlm.errors import UserError
from data_pipeline.errors import nearest

Score = Callable[[str, Sequence[str]], float]
F = TypeVar("F", bound=Score)

RESERVED = {"index", "turn", "key", "task", "question", "answers", "prediction", "images", "error"} | {
    "items", "baseline", "baseline_answer", "metrics", "unreadable", "seconds", "identity",
}  # fmt: skip
"""Fields that stand beside the scores in predictions and results."""


@dataclass(frozen=True)
class Metric:
    """A score of one prediction against its accepted answers; a task's score is the mean over its items."""

    name: str
    """What recipes and the keys of results.json call it."""
    title: str
    """What tables call it."""
    note: str
    """Half a sentence about what it counts, shown below the tables."""
    function: Score
    """(prediction, accepted answers) -> score in [0, 1]."""
    version: int = 1
    """Raised when its scores change, so that older results are computed again."""

    def __call__(self, prediction: str, answers: Sequence[str]) -> float:
        """Score of one prediction. Raises ValueError for no answers, or a score outside [0, 1]."""
        if isinstance(answers, str) or not answers:
            raise ValueError(f"answers must be a list with at least one accepted answer, got {answers!r}")
        value = float(self.function(prediction, answers))
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"metric {self.name!r} must return a score in [0, 1], not {value} for {prediction!r}")
        return value


_METRICS: dict[str, Metric] = {}


def register_metric(title: str, note: str = "", version: int = 1) -> Callable[[F], F]:
    """Decorator of a function (prediction, answers) -> score: tasks may name it by the function's own name.

    Raises:
        ValueError: the name is a field of predictions or results, or belongs to another metric.
    """

    def add(function: F) -> F:
        name = function.__name__
        known = _METRICS.get(name)
        if name in RESERVED or name.startswith("baseline_"):
            raise ValueError(f"a metric cannot be called {name!r}: results have a field of that name")
        if known is not None and known.function.__qualname__ != function.__qualname__:
            raise ValueError(f"the metric name {name!r} is taken")
        _METRICS[name] = Metric(name, title, note, function, version)
        return function

    return add


def metric_names() -> list[str]:
    """Names of all metrics, in the order of their registration."""
    return list(_METRICS)


def find_metric(name: str) -> Metric:
    """A metric by name. Raises UserError with the nearest name."""
    if name not in _METRICS:
        raise UserError(
            f"unknown metric {name!r}: {nearest(name, _METRICS)}. A metric of your own is known once its module is "
            "imported: name the module in the recipe's `imports`"
        )
    return _METRICS[name]
