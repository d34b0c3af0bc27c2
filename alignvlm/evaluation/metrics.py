"""Scores of one generated answer against its accepted answers, and of a constant answer over a whole task.

ANLS follows the DocVQA evaluator and relaxed accuracy the ChartQA one, so that numbers can stand beside published ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import TypedDict

ANLS_THRESHOLD = 0.5
MAX_RELATIVE_CHANGE = 0.05


class Scores(TypedDict):
    """Scores in [0, 1]; of one answer, or means over a task."""

    exact_match: float
    anls: float
    relaxed_accuracy: float


class Baseline(TypedDict):
    """The constant answer with the highest exact match, and its scores."""

    answer: str
    scores: Scores


def normalise(text: str) -> str:
    """Strip, casefold and collapse white space."""
    return " ".join(text.casefold().split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals one of the normalised answers, else 0.0."""
    _require_answers(answers)
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def levenshtein(a: str, b: str) -> int:
    """Least number of insertions, deletions and substitutions of characters that turn `a` into `b`."""
    if len(a) < len(b):
        a, b = b, a
    previous = list(range(len(b) + 1))
    for i, char_a in enumerate(a, start=1):
        current = [i]
        for j, char_b in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (char_a != char_b)))
        previous = current
    return previous[-1]


def anls(prediction: str, answers: Sequence[str], threshold: float = ANLS_THRESHOLD) -> float:
    """Average normalised Levenshtein similarity of one item: the best over the answers, 0 below the threshold.

    As in the DocVQA evaluator: lower case and collapsed spaces for the distance, lengths of the strings as given.
    """
    _require_answers(answers)
    best = 0.0
    for answer in answers:
        distance = levenshtein(" ".join(answer.lower().split()), " ".join(prediction.lower().split()))
        length = max(len(answer), len(prediction))
        best = max(best, 1.0 - distance / length if length else 1.0)
    return best if best >= threshold else 0.0


def relaxed_accuracy(
    prediction: str, answers: Sequence[str], max_relative_change: float = MAX_RELATIVE_CHANGE
) -> float:
    """1.0 for a number within 5 % of an accepted one, or for equal text (ChartQA, section 5.1), else 0.0.

    As in the evaluator that published numbers use: `40%` is 0.4 (so `40%` and `40` differ), numbers with thousands
    separators are text, and an answer of zero has no relative change, so it must be given literally.
    """
    _require_answers(answers)
    return float(any(_relaxed_match(prediction, answer, max_relative_change) for answer in answers))


def score(prediction: str, answers: Sequence[str]) -> Scores:
    """All three scores of one prediction."""
    return {
        "exact_match": exact_match(prediction, answers),
        "anls": anls(prediction, answers),
        "relaxed_accuracy": relaxed_accuracy(prediction, answers),
    }


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """Means over items (order-independent sums); all zero when there is no item."""
    count = max(len(scores), 1)
    return {
        "exact_match": math.fsum(s["exact_match"] for s in scores) / count,
        "anls": math.fsum(s["anls"] for s in scores) / count,
        "relaxed_accuracy": math.fsum(s["relaxed_accuracy"] for s in scores) / count,
    }


def most_frequent_answer(answer_lists: Sequence[Sequence[str]]) -> Baseline:
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
        return {"answer": "", "scores": mean_scores([])}
    constant = spelling[frequency.most_common(1)[0][0]]
    return {"answer": constant, "scores": mean_scores([score(constant, answers) for answers in answer_lists])}


def _relaxed_match(prediction: str, answer: str, max_relative_change: float) -> bool:
    predicted, target = _to_number(prediction), _to_number(answer)
    if predicted is not None and target:
        return abs(predicted - target) / abs(target) <= max_relative_change
    return " ".join(prediction.lower().split()) == " ".join(answer.lower().split())


def _to_number(text: str) -> float | None:
    text = text.strip()
    try:
        number = float(text.rstrip("%")) / 100.0 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _require_answers(answers: Sequence[str]) -> None:
    if isinstance(answers, str) or not answers:
        raise ValueError(f"answers must be a list with at least one accepted answer, got {answers!r}")
