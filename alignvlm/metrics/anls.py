"""Average normalised Levenshtein similarity, as the DocVQA evaluator computes it."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from alignvlm.metrics.registry import register_metric

THRESHOLD = 0.5


@register_metric("ANLS", "normalised edit similarity, 0 below 0.5")
def anls(prediction: str, answers: Sequence[str]) -> float:
    """Best similarity over the answers, 1 - distance / length of the longer text; 0.0 below the threshold.

    As in the DocVQA evaluator: lower case and collapsed spaces for the distance, lengths of the strings as given.
    """
    best = 0.0
    for answer in answers:
        distance = Levenshtein.distance(" ".join(answer.lower().split()), " ".join(prediction.lower().split()))
        length = max(len(answer), len(prediction))
        best = max(best, 1.0 - distance / length if length else 1.0)
    return best if best >= THRESHOLD else 0.0
