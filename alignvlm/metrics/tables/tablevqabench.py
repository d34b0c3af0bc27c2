"""The metrics of TableVQABench's four parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from alignvlm.metrics.registry import register_metric
from alignvlm.metrics.tables.denotation import normalise, same_denotation, unescaped_items, value_of

DROPPED_WORDS = (
    "dollar", "gallons", "square feet", "shares", "mbtu", "mbpd", "mbbls", "mmbtu", "unit", "gwh", "year", "mmcf",
    "mile", "mboe",
)  # fmt: skip
DROPPED = re.compile(rf"\b(?:{'|'.join(DROPPED_WORDS)})s?\b", re.IGNORECASE)
UNITS = [
    (re.compile(space + rf"\b{word}\b"), power)
    for space in (" ", "")
    for word, power in (("thousand", "e3"), ("million", "e6"), ("billion", "e9"))
] + [(re.compile(" ?%"), "e-2")]


class Amount(NamedTuple):
    """What an answer about an amount may mean."""

    exact: float | str
    candidates: tuple[float | str, float | str]
    """The amount with its unit, and without it."""


@register_metric("TableVQABench WTQ", "denotation accuracy of the items between bars")
def tablevqabench_vwtq(prediction: str, answers: Sequence[str]) -> float:
    """Denotation accuracy of items separated by `|` or `||`, without canonical forms; also of the synthetic part."""
    items = [value_of(item) for item in unescaped_items(prediction.replace("||", "|"))]
    return float(any(same_denotation([value_of(item) for item in unescaped_items(a)], items) for a in answers))


@register_metric("TableVQABench TabFact", "the reply contains the right one of true and false, and not both")
def tablevqabench_vtabfact(prediction: str, answers: Sequence[str]) -> float:
    """A test of substrings: `untrue` counts as true. The answer is `1` or `0`."""
    said = {word for word in ("true", "false") if word in prediction.lower()}
    return float(any(said == {{"1": "true", "0": "false"}.get(answer)} for answer in answers))


@register_metric("FinTabNetQA (exact)", "equal amounts, units included")
def fintabnetqa_exact(prediction: str, answers: Sequence[str]) -> float:
    """Equal amounts, or equal text."""
    said = amount_of(prediction)
    return float(any(said.exact == amount_of(answer).exact for answer in answers))


@register_metric("FinTabNetQA", "equal amounts, with or without the unit")
def fintabnetqa_relieved(prediction: str, answers: Sequence[str]) -> float:
    """Equal amounts or texts with the units of either side counted or not: the number that the benchmark reports."""
    said = set(amount_of(prediction).candidates)
    return float(any(not said.isdisjoint(amount_of(answer).candidates) for answer in answers))


def amount_of(text: str) -> Amount:
    """The amount that a text names: `$3,852 million` is 3852e6 with its unit and 3852 without."""
    text = DROPPED.sub("", re.sub(r"[$(),]", "", normalise(text)))
    bare = text
    for unit, power in UNITS:
        text, bare = unit.sub(power, text), unit.sub("", bare)
    try:
        return Amount(float(text), (float(text), float(bare)))
    except ValueError:
        return Amount(text, (text, bare))
