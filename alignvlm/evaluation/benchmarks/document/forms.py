"""What DeepForm and Kleister Charity share: one question per field of a document, F1 over all documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from alignvlm.evaluation.benchmarks.base import Benchmark, Flavour, Gold, Question, Scores
from alignvlm.evaluation.benchmarks.readers import Record
from alignvlm.metrics.tables import due_f1


class Forms(Benchmark):
    """Fields of forms by the DUE evaluator. A field that a document lacks is answered `None`."""

    flavours = MappingProxyType({"docowl": Flavour("{}")})
    headline = "f1"
    verified_items = False
    keys: ClassVar[tuple[str, ...]]
    """Names of the fields, in the order in which a question is searched for them."""

    def question(self, layout: str, number: int, record: Record) -> Question:
        """The question about one field, which is the first whose name occurs in it."""
        original = record.get("original_question", record["question"])
        key = next((key for key in self.keys if key in original), None)
        if key is None:
            raise record.wrong("question", f"names no field of {self.title} ({', '.join(self.keys)}): {original!r}")
        name = record.get("name") or Path(record["file_name"]).name.partition(".pdf")[0]
        document = record["document"]["annotations"] if "document" in record else None
        gold = {"name": name, "key": key, "answer": record["answer"], "annotations": document}
        return Question(str(number), record.text("question"), [record.image("image")], gold)

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """One field's part, as if it were a document of its own."""
        wanted = [pair for pair in _wanted([gold]) if pair.key == gold["key"]]
        ((_, predicted),) = due_f1.predicted_documents([self.said(reply, gold, flavour)])
        counts = due_f1.count_pairs(predicted, wanted)
        return {"precision": (counts.right, counts.predicted), "recall": (counts.found, counts.wanted)}

    def said(self, reply: str, gold: Gold, flavour: str) -> Mapping[str, Any]:
        """A cleaned reply as the prediction of its field."""
        return {"name": gold["name"], "key": gold["key"], "answer": reply}

    def units(self, rows: Sequence[Mapping[str, Any]], flavour: str) -> list[Scores]:
        """What every document adds, over all fields and per field."""
        how = self.flavours[flavour]
        units = []
        for _, group in groupby(rows, key=lambda row: row["gold"]["name"]):
            fields = list(group)
            wanted = _wanted([row["gold"] for row in fields])
            said = (self.said(how.clean(row["reply"]), row["gold"], flavour) for row in fields)
            ((_, predicted),) = due_f1.predicted_documents(said)
            scores: Scores = {}
            for key in ("", *self.keys):
                counts = due_f1.count_pairs(
                    [pair for pair in predicted if key in ("", pair.key)],
                    [pair for pair in wanted if key in ("", pair.key)],
                )
                end = f".{key}" if key else ""
                scores[f"precision{end}"] = (counts.right, counts.predicted)
                scores[f"recall{end}"] = (counts.found, counts.wanted)
            units.append(scores)
        return units

    def combine(self, rates: dict[str, Any]) -> dict[str, Any]:
        """F1 of precision and recall, over all fields and per field."""
        scores = {}
        for key in ("", *(f".{key}" for key in self.keys)):
            if f"precision{key}" in rates:
                precision, recall = rates[f"precision{key}"], rates[f"recall{key}"]
                both = precision + recall
                scores[f"f1{key}"] = 2 * precision * recall / (both + (both == 0))
        return scores | {"precision": rates["precision"], "recall": rates["recall"]}

    def notes(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Where the references come from."""
        if any(row["gold"]["annotations"] is None for row in rows):
            return ["approximation: without meta/document.jsonl each field has the one value of its own line"]
        return []


def _wanted(golds: Sequence[Gold]) -> list[due_f1.Pair]:
    """The references of a document: all that document.jsonl has, or the answers of its lines."""
    if golds[0]["annotations"] is not None:
        return due_f1.reference_pairs(golds[0])
    named = (gold for gold in golds if gold["answer"] != due_f1.ABSENT)
    return [due_f1.Pair(gold["key"], gold["answer"].upper()) for gold in named]
