"""Exact match, ignoring case and white space."""

from __future__ import annotations

from collections.abc import Sequence

from alignvlm.metrics.registry import register_metric


def normalise(text: str) -> str:
    """Strip, casefold and collapse white space."""
    return " ".join(text.casefold().split())


@register_metric("Exact match", "ignores case and white space")
def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals one of the normalised answers, else 0.0."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})
