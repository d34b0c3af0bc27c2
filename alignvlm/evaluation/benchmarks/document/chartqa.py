"""ChartQA, test: questions about charts, by relaxed accuracy over both of its parts."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from alignvlm.evaluation.benchmarks.base import (
    Benchmark,
    Flavour,
    Gold,
    Question,
    Scores,
    of_docowl,
    of_tsv,
    register_benchmark,
)
from alignvlm.evaluation.benchmarks.readers import Docowl, Original, Parquet, Record, Tsv


@register_benchmark
class ChartQA(Benchmark):
    """2,500 questions, written by people and by a model; the score is over all of them."""

    name = "chartqa"
    title = "ChartQA"
    published_items = 2500
    sources = MappingProxyType(
        {
            "huggingface": Parquet(("test",)),
            "vlmevalkit": Tsv(("ChartQA_TEST",)),
            "docdownstream": Docowl("ChartQA"),
            "ureader": Docowl("ChartQA"),
            "original": Original(
                ("test_human.json", "test_augmented.json"), image=lambda row: row["imgname"], image_folders=("png",)
            ),
        }
    )
    flavours = MappingProxyType(
        {
            "vlmevalkit": Flavour(metric="relaxed_accuracy_vlmevalkit"),
            "lmms_eval": Flavour(
                "{}\nAnswer the question with a single word.", metric="relaxed_accuracy_lmms_eval", max_new_tokens=16
            ),
            "docowl": Flavour("{}", metric="relaxed_accuracy_docowl"),
        }
    )

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A question with its part, where the layout names it."""
        if layout == "vlmevalkit":
            question, part = of_tsv(number, record), record.get("split")
        elif layout in ("docdownstream", "ureader"):
            question, part = of_docowl(number, record), None
        elif layout == "original":
            part = "human" if record["__file__"] == "test_human.json" else "augmented"
            question = _question(number, record, record.text("query"), [record.text("label")])
        elif "query" in record:  # HuggingFaceM4/ChartQA
            part = "augmented" if int(record["human_or_machine"]) else "human"
            question = _question(number, record, record.text("query"), record.texts("label"))
        else:
            part = "human" if record["type"] == "human_test" else "augmented"
            question = _question(number, record, record.text("question"), [record.text("answer")])
        return Question(question.id, question.text, question.images, question.gold | {"part": part})

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """Over all questions, and over those of the part."""
        scores = super().score(reply, gold, flavour)
        return scores | ({gold["part"]: scores["score"]} if gold.get("part") else {})


def _question(number: int, record: Record, text: str, answers: list[Any]) -> Question:
    return Question(str(number), text, [record.image("image")], {"answers": answers})
