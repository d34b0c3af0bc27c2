"""TextVQA, validation: questions about text in photographs, by agreement with ten people."""

from __future__ import annotations

from types import MappingProxyType

from alignvlm.evaluation.benchmarks.base import Benchmark, Flavour, Question, of_tsv, register_benchmark
from alignvlm.evaluation.benchmarks.readers import Parquet, Record, Tsv

PEOPLE = 10


@register_benchmark
class TextVQA(Benchmark):
    """5,000 questions. DocDownstream has the test split, which nobody outside can score."""

    name = "textvqa"
    title = "TextVQA"
    published_items = 5000
    sources = MappingProxyType({"huggingface": Parquet(("validation",)), "vlmevalkit": Tsv(("TextVQA_VAL",))})
    flavours = MappingProxyType({
        "vlmevalkit": Flavour(metric="textvqa_vlmevalkit"),
        "lmms_eval": Flavour(
            lambda question: f"{question.text.capitalize()}\nAnswer the question using a single word or phrase.",
            metric="textvqa_lmms_eval", until=("ASSISTANT:",),
        ),
        "official": Flavour(metric="vqa_official"),
    })  # fmt: skip

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A question with ten answers."""
        if layout == "vlmevalkit":
            question, column = of_tsv(number, record), "answer"
        else:
            column, gold = "answers", {"answers": record.texts("answers")}
            question = Question(record.text("question_id"), record.text("question"), [record.image("image")], gold)
        given = len(question.gold["answers"])
        if given != PEOPLE:
            raise record.wrong(column, f"has {given} answers, not {PEOPLE}: is this the test split?")
        return question
