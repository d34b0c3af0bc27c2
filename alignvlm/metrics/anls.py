"""Average normalised Levenshtein similarity by its two rules: of the DocVQA evaluators, and of the DUE evaluator."""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from alignvlm.metrics.registry import register_metric

THRESHOLD = 0.5


@register_metric("ANLS", "normalised edit similarity, 0 below 0.5")
def anls(prediction: str, answers: Sequence[str]) -> float:
    """Best similarity over the answers, 1 - distance / length of the longer text; 0.0 below the threshold.

    As in lmms-eval and VLMEvalKit: lower case and collapsed spaces for the distance; lengths of the strings as given,
    but in upper case, where `ß` has two letters.
    """
    best = 0.0
    for answer in answers:
        distance = Levenshtein.distance(" ".join(answer.lower().split()), " ".join(prediction.lower().split()))
        length = max(len(answer.upper()), len(prediction.upper()))
        best = max(best, 1.0 - distance / length if length else 1.0)
    return best if best >= THRESHOLD else 0.0


@register_metric("ANLS (DUE)", "normalised edit similarity in upper case, 0 up to 0.5")
def anls_due(prediction: str, answers: Sequence[str]) -> float:
    """Best similarity over the variants of an answer as the DUE evaluator counts it: exactly 0.5 is 0.0.

    Upper case on both sides, white space as it is.
    """
    best = 0.0
    for answer in answers:
        one, other = answer.upper(), prediction.upper()
        length = max(len(one), len(other))
        best = max(best, 1.0 - Levenshtein.distance(one, other) / length if length else 1.0)
    return best if best > THRESHOLD else 0.0
