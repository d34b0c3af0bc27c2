"""Relaxed accuracy (ChartQA, section 5.1): our own for tasks, and the rule of the three evaluators by flavour."""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Sequence

from alignvlm.metrics.registry import register_metric

MAX_RELATIVE_CHANGE = 0.05


@register_metric("Relaxed accuracy", "numbers within 5 %, other text as exact match")
def relaxed_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """1.0 for a number within 5 % of an accepted one, or for equal text, else 0.0.

    `40%` is 0.4 (so `40%` and `40` differ), numbers with thousands separators are text, and an answer of zero has no
    relative change, so it must be given literally.
    """
    return float(any(_matches(_tidy(prediction), _tidy(answer), _to_finite) for answer in answers))


@register_metric("Relaxed accuracy (lmms-eval)", "numbers within 5 %, other text equal in lower case")
def relaxed_accuracy_lmms_eval(prediction: str, answers: Sequence[str]) -> float:
    """The rule of the published evaluators on the stripped reply: text that is no number must be equal but for case."""
    return float(any(_matches(prediction.strip(), answer) for answer in answers))


@register_metric("Relaxed accuracy (VLMEvalKit)", "numbers within 5 %, other text equal in lower case")
def relaxed_accuracy_vlmevalkit(prediction: str, answers: Sequence[str]) -> float:
    """As lmms-eval, but an answer that is written as a Python list stands for its members."""
    accepted = [member for answer in answers for member in answers_in_cell(answer)]
    return relaxed_accuracy_lmms_eval(prediction, accepted)


@register_metric("Relaxed accuracy (DocOwl)", "numbers within 5 %, other text equal in lower case")
def relaxed_accuracy_docowl(prediction: str, answers: Sequence[str]) -> float:
    """As lmms-eval, without newlines on both sides, and an answer loses one final full stop."""
    accepted = [without_newlines(answer).removesuffix(".") for answer in answers]
    return float(any(_matches(without_newlines(prediction), answer) for answer in accepted))


def answers_in_cell(cell: str) -> list[str]:
    """The answers in a cell of a VLMEvalKit file: a Python list literal has several, any other text is one."""
    if not (cell.strip().startswith(("[", "(")) and cell.strip().endswith(("]", ")"))):
        return [cell]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # text such as `[1and 2]`
            value = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]
    return [str(member) for member in value] if isinstance(value, list) else [cell]


def without_newlines(text: str) -> str:
    """The text as the DocOwl evaluation compares it: newline characters deleted, then stripped."""
    return text.replace("\n", "").strip()


def _to_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _to_finite(text: str) -> float | None:
    number = _to_number(text)
    return number if number is not None and math.isfinite(number) else None


def _tidy(text: str) -> str:
    return " ".join(text.split())


def _matches(predicted: str, target: str, to_number: Callable[[str], float | None] = _to_number) -> bool:
    number, wanted = to_number(predicted), to_number(target)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= MAX_RELATIVE_CHANGE
    return predicted.lower() == target.lower()
