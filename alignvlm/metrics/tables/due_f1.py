"""F1 of forms as the DUE evaluator counts it: DeepForm and Kleister Charity, over all documents and per key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from alignvlm.metrics.relaxed_accuracy import without_newlines

ABSENT = "None"
"""The reply that gives no value for a key; anything else is a prediction."""


@dataclass(frozen=True)
class Pair:
    """One value of a key, in upper case, with the forms that count as equal."""

    key: str
    value: str
    variants: tuple[str, ...] = ()

    def matches(self, other: Pair) -> bool:
        """Equal keys, and equal values or one value among the other's variants."""
        return self.key == other.key and (
            self.value == other.value or self.value in other.variants or other.value in self.variants
        )


class Counts(NamedTuple):
    """Predictions and references, and how many of each found one of the other side."""

    right: int
    predicted: int
    found: int
    wanted: int


def predicted_documents(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, list[Pair]]]:
    """Name and predicted pairs of every document: neighbouring rows `{name, key, answer}` with one name are one."""
    documents = []
    for name, group in groupby(rows, key=lambda row: row["name"]):
        answers = ((row["key"], without_newlines(str(row["answer"]))) for row in group)  # null is written as `None`
        documents.append((name, [Pair(key, answer.upper()) for key, answer in answers if answer != ABSENT]))
    return documents


def reference_pairs(document: Mapping[str, Any]) -> list[Pair]:
    """The pairs of a document of the DUE schema, one per value."""
    return [
        Pair(item["key"], value["value"].upper(), tuple(v.upper() for v in value.get("value_variants") or ()))
        for item in document["annotations"]
        for value in item["values"]
    ]


def count_pairs(predicted: Sequence[Pair], wanted: Sequence[Pair]) -> Counts:
    """Each prediction takes one equal reference, in order; then each reference takes one equal prediction."""
    return Counts(_taken(predicted, wanted), len(predicted), _taken(wanted, predicted), len(wanted))


def f1_of(counts: Iterable[Counts]) -> dict[str, float]:
    """`f1`, `precision` and `recall` over all documents, from 0 to 1; 0 where nothing is predicted or wanted."""
    right, predicted, found, wanted = (sum(column) for column in zip(*counts, (0, 0, 0, 0), strict=True))
    precision = right / predicted if predicted else 0.0
    recall = found / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def due_f1(rows: Iterable[Mapping[str, Any]], documents: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """F1 of rows in file order against documents of the DUE schema, paired by position."""
    pairs = zip(predicted_documents(rows), documents, strict=False)
    return f1_of(count_pairs(predicted, reference_pairs(document)) for (_, predicted), document in pairs)


def _taken(takers: Sequence[Pair], given: Sequence[Pair]) -> int:
    left = list(given)
    for taker in takers:
        match = next((position for position, other in enumerate(left) if taker.matches(other)), None)
        if match is not None:
            del left[match]
    return len(given) - len(left)
