"""Exact match: ignoring case and white space, and as the harnesses compare the answers of GQA."""

from __future__ import annotations

import string
from collections.abc import Sequence
from typing import Any

from alignvlm.metrics.registry import register_metric

NO_PUNCTUATION: Any = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Strip, casefold and collapse white space."""
    return " ".join(text.casefold().split())


@register_metric("Exact match", "ignores case and white space")
def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 when the normalised prediction equals one of the normalised answers, else 0.0."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


@register_metric("GQA (lmms-eval)", "ignores case and ASCII punctuation")
def gqa_lmms_eval(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers (GQA has one) equal in lower case without the 32 ASCII punctuation characters.

    By numpy's texts, as there: they keep their length, so a letter that is longer in lower case (`İ`) costs the end.
    """
    import numpy as np

    said, wanted = (
        np.char.translate(np.char.lower(np.asarray(texts)), NO_PUNCTUATION)
        for texts in ([prediction.strip()], list(answers))
    )
    return float(np.mean(said == wanted))


@register_metric("GQA (VLMEvalKit)", "ignores case")
def gqa_vlmevalkit(prediction: str, answers: Sequence[str]) -> float:
    """Share of the answers equal in lower case without outer white space; a final full stop makes one wrong."""
    hits = [prediction.strip().lower() == answer.strip().lower() for answer in answers]
    return sum(hits) / len(hits)
