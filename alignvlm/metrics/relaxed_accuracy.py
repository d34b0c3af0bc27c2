"""Relaxed accuracy (ChartQA, section 5.1), as the evaluator behind the published numbers computes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from alignvlm.metrics.registry import register_metric

MAX_RELATIVE_CHANGE = 0.05


@register_metric("Relaxed accuracy", "numbers within 5 %, other text as exact match")
def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 for a number within 5 % of an accepted one, or for equal text, else 0.0.

    `40%` is 0.4 (so `40%` and `40` differ), numbers with thousands separators are text, and an answer of zero has no
    relative change, so it must be given literally.
    """
    return float(any(_matches(prediction, answer) for answer in answers))


def _matches(prediction: str, answer: str) -> bool:
    predicted, target = _to_number(prediction), _to_number(answer)
    if predicted is not None and target:
        return abs(predicted - target) / abs(target) <= MAX_RELATIVE_CHANGE
    return " ".join(prediction.lower().split()) == " ".join(answer.lower().split())


def _to_number(text: str) -> float | None:
    text = text.strip()
    try:
        number = float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
