"""Denotation accuracy of WikiTableQuestions: sets of texts, numbers and dates that mean the same."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from alignvlm.metrics.registry import register_metric

TOLERANCE = 1e-6
SAME_CHARACTERS = str.maketrans(dict.fromkeys("‘’´`", "'") | dict.fromkeys("“”", '"') | dict.fromkeys("‐‑‒–—−", "-"))
NOTES_AT_END = re.compile(r"(?:(?<!^)\[[^\]]*\]|\[\d+\]|[•♦†‡*#+])*$")
BRACKETS_AT_END = re.compile(r"(?<!^)(?: \([^)]*\))*$")
QUOTED = re.compile(r'^"([^"]*)"$')


@dataclass(frozen=True)
class Value:
    """What one item of an answer means."""

    text: str
    """The item's normalised text."""
    number: int | float | None = None
    date: tuple[int, int, int] | None = None
    """Year, month and day; -1 where one is not known."""

    @property
    def identity(self) -> object:
        """Items of equal identity are one item of a set."""
        if self.number is not None:
            return ("number", self.number)
        return ("date", self.date) if self.date is not None else ("text", self.text)

    def matches(self, other: Value) -> bool:
        """Whether two items mean the same: equal texts, numbers that differ by less than 1e-6, or equal dates."""
        if self.text == other.text:
            return True
        if self.number is not None and other.number is not None:
            return abs(self.number - other.number) < TOLERANCE
        return self.date is not None and self.date == other.date


def normalise(text: str) -> str:
    """The text without diacritics, final notes and brackets, outer quotes and full stop; lower case, single spaces."""
    text = "".join(c for c in unicodedata.normalize("NFKD", text) if unicodedata.category(c) != "Mn")
    text = text.translate(SAME_CHARACTERS)
    before = None
    while text != before:
        before = text
        text = NOTES_AT_END.sub("", text.strip())
        text = BRACKETS_AT_END.sub("", text.strip())
        text = QUOTED.sub(r"\1", text.strip())
    return re.sub(r"\s+", " ", text.removesuffix(".")).lower().strip()


def value_of(text: str, canon: str = "") -> Value:
    """The meaning of an item; `canon` is its known canonical form, by default the text itself."""
    canon = canon or text
    date = _date(canon)
    number = _number(canon)
    if number is None and date is not None and date[1] == date[2] == -1:
        number = date[0]
    if number is not None:
        amount = int(number) if abs(number - round(number)) < TOLERANCE else float(number)
        return Value(normalise(text) if text else str(amount), number=amount)
    if date is not None and not text:
        year, month, day = date
        text = f"{'xx' if year == -1 else year}-{'xx' if month == -1 else month}-{day}"
    return Value(normalise(text), date=date)


def same_denotation(targets: Sequence[Value], predictions: Sequence[Value]) -> bool:
    """Whether two answers have as many different items, and every target matches a prediction."""
    wanted, given = _distinct(targets), _distinct(predictions)
    return len(wanted) == len(given) and all(any(target.matches(value) for value in given) for target in wanted)


def unescaped_items(text: str) -> list[str]:
    """Items of a list as the TSV files of WikiTableQuestions write it: separated by `|`, with escapes."""
    items = text.split("|")
    return [item.replace(r"\n", "\n").replace(r"\p", "|").replace("\\\\", "\\") for item in items]


def wtq_official(items: Sequence[str], target: Mapping[str, str]) -> float:
    """1.0 when the predicted items mean `targetValue`, whose canonical forms are `targetCanon`.

    Raises:
        ValueError: the two fields have different numbers of items.
    """
    texts, canons = unescaped_items(target["targetValue"]), unescaped_items(target["targetCanon"])
    targets = [value_of(text, canon) for text, canon in zip(texts, canons, strict=True)]
    return float(same_denotation(targets, [value_of(item) for item in items]))


def wtq_due_items(items: Sequence[str], answers: Sequence[str]) -> float:
    """1.0 when the predicted items mean the answers, which together are one answer, without canonical forms."""
    targets = [value_of(answer.upper()) for answer in answers]
    return float(same_denotation(targets, [value_of(item.upper()) for item in items]))


@register_metric("WTQ (DUE)", "the reply as one value against all values of the answer")
def wtq_due(prediction: str, answers: Sequence[str]) -> float:
    """Denotation accuracy of the DUE evaluator: the whole reply is one item, so several answers are never right."""
    return wtq_due_items([prediction.strip().replace("\n", "")], answers)


@register_metric("WTQ (DUE, split)", "as WTQ (DUE), with the reply split at ' | '")
def wtq_due_split(prediction: str, answers: Sequence[str]) -> float:
    """As `wtq_due` with the reply split at ` | `, as the baseline of DUE writes several answers."""
    return wtq_due_items(prediction.strip().replace("\n", "").split(" | "), answers)


def _distinct(values: Sequence[Value]) -> list[Value]:
    """The first value of every identity."""
    found: dict[object, Value] = {}
    for value in values:
        found.setdefault(value.identity, value)
    return list(found.values())


def _number(text: str) -> int | float | None:
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _date(text: str) -> tuple[int, int, int] | None:
    parts = text.lower().split("-")
    if len(parts) != 3:
        return None
    unknown = (("xx", "xxxx"), ("xx",), ("xx",))
    try:
        year, month, day = (-1 if part in names else int(part) for part, names in zip(parts, unknown, strict=True))
    except ValueError:
        return None
    known = not year == month == day == -1
    if known and (month == -1 or 1 <= month <= 12) and (day == -1 or 1 <= day <= 31):
        return year, month, day
    return None
