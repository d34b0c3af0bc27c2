"""DocVQA, validation: questions about scanned documents, by ANLS."""

from __future__ import annotations

from types import MappingProxyType

from alignvlm.evaluation.benchmarks.base import Benchmark, Flavour, Question, of_docowl, of_tsv, register_benchmark
from alignvlm.evaluation.benchmarks.readers import Docowl, Parquet, Record, Tsv

ANLS_FLAVOURS = {
    "vlmevalkit": Flavour(metric="anls"),
    "lmms_eval": Flavour(metric="anls", max_new_tokens=32),
    "docowl": Flavour("{}", metric="anls_due", one_line=True, layouts=("docdownstream", "ureader")),
}
"""How DocVQA and InfographicVQA are asked and scored."""


@register_benchmark
class DocVQA(Benchmark):
    """5,349 questions."""

    name = "docvqa"
    title = "DocVQA"
    published_items = 5349
    sources = MappingProxyType(
        {
            "huggingface": Parquet(("validation",), "DocVQA", siblings=("InfographicVQA",)),
            "vlmevalkit": Tsv(("DocVQA_VAL",)),
            "docdownstream": Docowl("DocVQA"),
            "ureader": Docowl("DocVQA"),
        }
    )
    flavours = MappingProxyType(ANLS_FLAVOURS)

    def question(self, layout: str, number: int, record: Record) -> Question:
        """Question, page and accepted answers."""
        if layout == "vlmevalkit":
            return of_tsv(number, record)
        if layout != "huggingface":
            return of_docowl(number, record, variants=True)
        gold = {"answers": record.texts("answers")}
        return Question(record.text("questionId"), record.text("question"), [record.image("image")], gold)
