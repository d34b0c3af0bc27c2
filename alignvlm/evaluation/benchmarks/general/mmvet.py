"""MM-Vet: open questions that a judge scores. Replies are written for it, and its scores are taken from a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from alignvlm.evaluation.benchmarks.base import Benchmark, Flavour, Gold, Question, Scores, register_benchmark
from alignvlm.evaluation.benchmarks.readers import Original, Parquet, Record, Tsv
from alignvlm.metrics.mmvet import CAPABILITIES

REASON = (
    "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n{}"
)


def _rows(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for id, row in content.items():
        yield {**row, "question_id": id, "capability": ",".join(row["capability"])}


@register_benchmark
class MMVet(Benchmark):
    """218 questions. Without a judge's scores there is no score."""

    name = "mmvet"
    title = "MM-Vet"
    published_items = 218
    sources = MappingProxyType(
        {
            "huggingface": Parquet(("test",)),
            "vlmevalkit": Tsv(("MMVet",)),
            "original": Original(("mm-vet.json",), _rows, lambda row: row["imagename"], ("images", ".")),
        }
    )
    flavours = MappingProxyType(
        {
            "vlmevalkit": Flavour("{}", max_new_tokens=1024),
            "lmms_eval": Flavour(REASON, max_new_tokens=1024),
            "official": Flavour("{}", max_new_tokens=1024),
        }
    )
    judged = True

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A question; its ids are `v1_0` to `v1_217`."""
        tsv = layout == "vlmevalkit"
        id = record.text("index" if tsv else "question_id")
        needs = record.text("category" if tsv else "capability").replace(" ", "")
        unknown = sorted(set(needs.split(",")) - set(CAPABILITIES))
        if unknown:
            raise record.wrong(
                "category" if tsv else "capability", f"names {unknown[0]!r}, not {', '.join(CAPABILITIES)}"
            )
        gold = {"answer": record.text("answer"), "capability": needs}
        images = record["images"] if tsv else [record.image("image")]
        return Question(f"v1_{id}" if id.isdecimal() else id, record.text("question"), images, gold)

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """The judge's score, over all questions and per capability; nothing without one."""
        if "judge" not in gold:
            return {}
        value = (float(gold["judge"]), 1.0)
        return {"score": value, **dict.fromkeys(gold["capability"].split(","), value)}

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What the official judge reads: id -> reply."""
        return {row["id"]: row["reply"].strip() for row in rows}

    def notes(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Whether a judge has been there."""
        if any("judge" in row["gold"] for row in rows):
            return []
        return ["not scored without a judge: alignvlm score REPLIES --judge SCORES takes the scores of one"]
