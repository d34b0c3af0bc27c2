"""VCR: how well a reply restores the covered words of a caption, by the closest window of its tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from alignvlm.errors import UserError

REFUSALS = ("I can't", "I cannot", "无法", "抱歉")


class Blank(NamedTuple):
    """Scores of one covered text."""

    exact_match: float
    jaccard: float


def score_blanks(reply: str, blanks: Sequence[str]) -> list[Blank]:
    """Exact match and Jaccard index of every covered text of an image, case-sensitive.

    Of all windows of the reply with as many tokens as the blank, and at least one in common, the most similar by
    `SequenceMatcher` is compared. A reply that refuses scores 0 everywhere.

    Raises:
        UserError: spaCy is not installed.
    """
    reply = reply.split("Assistant: ")[-1]
    if "sorry" in reply.lower() or any(words in reply for words in REFUSALS):
        return [Blank(0.0, 0.0)] * len(blanks)
    said = tokenise(reply)
    return [_score(said, blank) for blank in blanks]


def tokenise(text: str) -> list[str]:
    """Tokens of spaCy's English rules. Raises UserError where spaCy is not installed."""
    return [token.text for token in _tokenizer()(text)]


def _score(said: list[str], blank: str) -> Blank:
    covered = tokenise(blank)
    wanted = set(covered)
    best: list[str] = []
    highest = 0.0
    for start in range(len(said) - len(covered) + 1 if covered else 0):
        window = said[start : start + len(covered)]
        if wanted.isdisjoint(window):
            continue
        similarity = SequenceMatcher(None, " ".join(window), blank).ratio()
        if similarity > highest:
            best, highest = window, similarity
    if not best:
        return Blank(0.0, 0.0)
    return Blank(float(best == covered), len(wanted & set(best)) / len(wanted | set(best)))


@functools.cache
def _tokenizer() -> Any:
    try:
        import spacy
    except ImportError as error:
        raise UserError("VCR needs spaCy's tokenizer: pip install 'alignvlm[vcr]'") from error
    return spacy.blank("en").tokenizer
