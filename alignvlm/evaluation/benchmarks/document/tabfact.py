"""TabFact, test: statements about pictures of tables, by accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from alignvlm.evaluation.benchmarks.base import (
    Benchmark,
    Flavour,
    Gold,
    Question,
    Scores,
    register_benchmark,
)
from alignvlm.evaluation.benchmarks.readers import Docowl, Original, Record
from alignvlm.metrics import find_metric


def _statements(tables: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for table, (statements, labels, _) in tables.items():
        for statement, label in zip(statements, labels, strict=True):
            yield {"table": table, "statement": statement, "label": label}


@register_benchmark
class TabFact(Benchmark):
    """12,779 statements about 1,695 tables; DocDownstream lacks at least one of the tables."""

    name = "tabfact"
    title = "TabFact"
    published_items = 12779
    sources = MappingProxyType(
        {
            "docdownstream": Docowl("TabFact", skips_documents=True),
            "ureader": Docowl("TabFact", skips_documents=True),
            "original": Original(
                ("test_examples.json",),
                rows=_statements,
                image=lambda row: row["table"].removesuffix(".csv") + ".png",
                image_folders=("images", "../images"),
            ),
        }
    )
    flavours = MappingProxyType({"docowl": Flavour("{}", metric="tabfact_docowl_exact")})

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A statement, which is `True` or `False`."""
        if layout != "original":
            gold = {"answers": [record["answer"]]}
            return Question(str(number), record.text("question"), [record.image("image")], gold)
        if record["label"] not in (0, 1):
            raise record.wrong("label", f"must be 0 or 1, not {record['label']!r}")
        gold = {"answers": ["True" if record["label"] else "False"]}
        return Question(str(number), record.text("statement"), [record.image("image")], gold)

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """Exact as DocOwl compares; the tolerant score is ours."""
        tolerant = find_metric("tabfact_tolerant")(reply, gold["answers"])
        return super().score(reply, gold, flavour) | {"tolerant": (tolerant, 1)}
