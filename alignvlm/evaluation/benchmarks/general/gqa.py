"""GQA, balanced test-dev: questions about scenes, by exact match."""

from __future__ import annotations

from types import MappingProxyType

from alignvlm.evaluation.benchmarks.base import Benchmark, Flavour, Question, of_tsv, register_benchmark
from alignvlm.evaluation.benchmarks.readers import Join, Parquet, Record, Tsv


@register_benchmark
class GQA(Benchmark):
    """12,578 questions about 398 pictures; the parquet dataset keeps the two in configs of their own."""

    name = "gqa"
    title = "GQA"
    published_items = 12578
    sources = MappingProxyType(
        {
            "huggingface": Parquet(
                ("testdev",),
                "testdev_balanced_instructions",
                join=Join("testdev_balanced_images", key="imageId", of="id", column="image"),
            ),
            "vlmevalkit": Tsv(("GQA_TestDev_Balanced",)),
        }
    )
    flavours = MappingProxyType(
        {
            "vlmevalkit": Flavour(metric="gqa_vlmevalkit"),
            "lmms_eval": Flavour(metric="gqa_lmms_eval", max_new_tokens=16),
        }
    )

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A question, its picture and its answer."""
        if layout == "vlmevalkit":
            return of_tsv(number, record)
        gold = {"answers": [record.text("answer")]}
        return Question(record.text("id"), record.text("question"), [record.image("image")], gold)
