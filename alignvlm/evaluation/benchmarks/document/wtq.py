"""WikiTableQuestions, test: questions about pictures of tables, by denotation accuracy."""

from __future__ import annotations

from types import MappingProxyType

from alignvlm.evaluation.benchmarks.base import (
    Benchmark,
    Flavour,
    Gold,
    Question,
    Scores,
    of_docowl,
    register_benchmark,
)
from alignvlm.evaluation.benchmarks.readers import Docowl, Original, Record
from alignvlm.metrics import find_metric
from alignvlm.metrics.tables.denotation import wtq_official


@register_benchmark
class WikiTableQuestions(Benchmark):
    """4,344 questions. The authors' files hold no pictures: `images/<table>.png` are the reader's own renderings."""

    name = "wtq"
    title = "WTQ"
    published_items = 4344
    sources = MappingProxyType(
        {
            "docdownstream": Docowl("WikiTableQuestions"),
            "ureader": Docowl("WikiTableQuestions"),
            "original": Original(
                ("pristine-unseen-tables.tagged",),
                image=lambda row: row.text("context").removeprefix("csv/").removesuffix(".csv") + ".png",
                image_folders=("images", "../images", "../../images"),
            ),
        }
    )
    flavours = MappingProxyType(
        {
            "docowl": Flavour("{}", metric="wtq_due", layouts=("docdownstream", "ureader")),
            "official": Flavour("{}", layouts=("original",)),
        }
    )

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A question and all values of its answer; the authors' files also have their canonical forms."""
        if layout != "original":
            return of_docowl(number, record)
        gold = {key: record.text(key) for key in ("targetValue", "targetCanon")}
        if len({text.count("|") for text in gold.values()}) > 1:
            raise record.wrong("targetCanon", f"has another number of items than targetValue: {gold!r:.200}")
        return Question(record.text("id"), record.text("utterance"), [record.image("image")], gold)

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """Denotation accuracy; also with the reply split where it gives several values."""
        if flavour == "official":
            return {"score": (wtq_official([item.strip() for item in reply.split("|")], gold), 1)}
        split = find_metric("wtq_due_split")(reply, gold["answers"])
        return super().score(reply, gold, flavour) | {"split at ' | '": (split, 1)}
