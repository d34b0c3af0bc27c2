"""Exact match: ignoring case and white space, and as the harnesses compare the answers of GQA."""

from __future__ import annotations

import string
from collections.abc import Sequence

from alignvlm.metrics.registry import register_metric

NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Strip, casefold and collapse white space."""
    return " ".join(text.casefold().split())


@register_metric("Exact match", "ignores case and white space")
def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals one of the normalised answers, else 0.0."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


@register_metric("GQA (lmms-eval)", "ignores case and ASCII punctuation")
def gqa_lmms_eval(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers (GQA has one) equal in lower case without the 32 ASCII punctuation characters."""
    said = prediction.strip().lower().translate(NO_PUNCTUATION)
    return _share([said == answer.lower().translate(NO_PUNCTUATION) for answer in answers])


@register_metric("GQA (VLMEvalKit)", "ignores case")
def gqa_vlmevalkit(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers equal in lower case without outer white space; a final full stop makes one wrong."""
    return _share([prediction.strip().lower() == answer.strip().lower() for answer in answers])


def _share(hits: Sequence[bool]) -> float:
    """Both harnesses take the mean over the answers."""
    return sum(hits) / len(hits)
