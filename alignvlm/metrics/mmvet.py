"""MM-Vet: means of a judge's scores, over all items and per capability. Nothing here judges."""

from __future__ import annotations

from collections.abc import Sequence

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")


def mmvet_scores(scores: Sequence[float], capabilities: Sequence[str]) -> dict[str, float]:
    """`overall` and one mean per capability, in percent; 0 for a capability that no item has.

    Args:
        scores: one per item, from 0 to 1.
        capabilities: comma-separated names per item, such as `ocr,math`.
    """
    result = {"overall": _percent(scores)}
    for name in CAPABILITIES:
        result[name] = _percent([score for score, needed in zip(scores, capabilities, strict=True) if name in needed])
    return result


def _percent(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores) * 100 if scores else 0.0
