"""TabFact: whether a statement about a table was called true or false."""

from __future__ import annotations

import string
from collections.abc import Sequence

from alignvlm.metrics.registry import register_metric
from alignvlm.metrics.relaxed_accuracy import without_newlines

WORDS = {
    **dict.fromkeys(("true", "yes", "1", "entailed"), True),
    **dict.fromkeys(("false", "no", "0", "refuted"), False),
}


@register_metric("TabFact", "exactly `True` or `False`, as the DocOwl evaluation compares them")
def tabfact_docowl_exact(prediction: str, answers: Sequence[str]) -> float:
    """Equal with case; newlines and outer white space do not count, and the answer loses one final full stop."""
    said = without_newlines(prediction)
    return float(any(said == without_newlines(answer).removesuffix(".") for answer in answers))


@register_metric("TabFact (tolerant)", "true, yes, 1, entailed against false, no, 0, refuted; our own")
def tabfact_tolerant(prediction: str, answers: Sequence[str]) -> float:
    """Equal in meaning; no published evaluation counts like this."""
    said = _truth(prediction)
    return float(said is not None and any(said == _truth(answer) for answer in answers))


def _truth(text: str) -> bool | None:
    return WORDS.get(text.strip().strip(string.punctuation).lower())
