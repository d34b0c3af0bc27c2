"""SEED-Bench, the questions about images: four options each."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from alignvlm.evaluation.benchmarks.base import LETTER, Benchmark, Flavour, Gold, Question, Scores, register_benchmark
from alignvlm.evaluation.benchmarks.general.options import choice_vlmevalkit, listed, options_of_tsv
from alignvlm.evaluation.benchmarks.readers import Only, Original, Parquet, Record, Tsv
from alignvlm.metrics.choices.letters import NO_LETTER, choose_vlmevalkit, seedbench_lmms_eval

LETTERS = "ABCD"


def _of_images(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    return (row for row in content["questions"] if row["data_type"] == "image")


@register_benchmark
class SEEDBench(Benchmark):
    """14,233 questions about images are said to be among all 18,000."""

    name = "seedbench"
    title = "SEED-Bench (image)"
    published_items = 14233
    verified_items = False
    sources = MappingProxyType(
        {
            "huggingface": Parquet(("test",), only=Only("data_type", "image", ("video",))),
            "vlmevalkit": Tsv(("SEEDBench_IMG",)),
            "original": Original(
                ("SEED-Bench.json",), _of_images, lambda row: row["data_id"], ("SEED-Bench-image", ".")
            ),
        }
    )
    flavours = MappingProxyType(
        {
            "vlmevalkit": Flavour(choice_vlmevalkit),
            "lmms_eval": Flavour(lambda asked: f"{asked.text}\n{listed(asked)}\n{LETTER}", until=("ASSISTANT:",)),
        }
    )

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A question about one image or several."""
        if layout == "vlmevalkit":
            options, images, id = options_of_tsv(record), record["images"], record.text("index")
        else:
            options = {letter: record.text(f"choice_{letter.lower()}") for letter in LETTERS}
            images, id = record.images("image"), record.text("question_id")
        gold = {"answer": record.text("answer"), "options": options}
        if gold["answer"] not in options:
            raise record.wrong("answer", f"must be one of {', '.join(options)}, not {gold['answer']!r}")
        return Question(id, record.text("question"), images, gold, options)

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """Accuracy, and how many replies named no option."""
        if flavour == "lmms_eval":
            return {"score": (seedbench_lmms_eval(reply, gold["answer"]), 1.0)}
        letter = choose_vlmevalkit(reply, gold["options"])
        return {"score": (float(letter == gold["answer"]), 1.0), "unparsed": (float(letter == NO_LETTER), 1.0)}
