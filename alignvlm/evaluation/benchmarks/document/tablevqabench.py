"""TableVQABench: four parts with prompts and metrics of their own."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from alignvlm.evaluation.benchmarks.base import Benchmark, Flavour, Gold, Question, Scores, register_benchmark
from alignvlm.evaluation.benchmarks.readers import Parquet, Record, Tsv
from alignvlm.metrics import find_metric

WTQ = (
    "You are asked to answer questions asked on an image.\nYou should answer the question with a single word.\n"
    "Example: \nQuestion: what was the only year mr. wu competed in the olympic games?\nAnswer: 2004\n"
    "Question: which township in pope county, arkansas has the least amount of water area?\nAnswer: Freeman\n"
    "If you have multiple answers, please separate them with || marks. Example: Apple||Banana||Tomato\n\n"
    "Question: {}\nAnswer:"
)
TABFACT = (
    "You are asked to answer whether the statement is True or False based on given image\n"
    "You should only answer True or False.\nExample: \n"
    "Statement: the milwaukee buck win 6 game in the 2010 - 11 season\nAnswer: True\n"
    "Statement: only the top team score above the average of 8.8\nAnswer: False\n\nStatement: {}\nAnswer:"
)
FINTABNET = (
    "You are asked to answer questions asked on a image.\n"
    "You should answer the question within a single word or few words.\n"
    "If units can be known, the answer should include units such as $, %, million and etc.\nExample: \n"
    "Question: What were the total financing originations for the fiscal year ended October 31, 2004?\n"
    "Answer: $3,852 million\nQuestion: What is the time period represented in the table?\nAnswer: October 31\n"
    "Question: What was the percentage of net sales for selling, general and administrative expenses in 2006?\n"
    "Answer: 34.2%\nQuestion: {}\nAnswer:"
)
PROMPTS = {"vwtq": WTQ, "vwtq_syn": WTQ, "vtabfact": TABFACT, "fintabnetqa": FINTABNET}
METRICS = {
    "vwtq": "tablevqabench_vwtq", "vwtq_syn": "tablevqabench_vwtq", "vtabfact": "tablevqabench_vtabfact",
    "fintabnetqa": "fintabnetqa_relieved",
}  # fmt: skip


def _vlmevalkit(question: Question) -> str:
    return PROMPTS[question.gold["part"]].replace("{}", question.text)


def _official(question: Question) -> str:
    return _vlmevalkit(question).replace("only answer True or False", "only answer true or false")


@register_benchmark
class TableVQABench(Benchmark):
    """1,500 questions; the paper's number is the plain mean of the four parts."""

    name = "tablevqabench"
    title = "TableVQA"
    published_items = 1500
    sources = MappingProxyType(
        {"huggingface": Parquet(tuple(PROMPTS)), "vlmevalkit": Tsv(("TableVQABench", "tablevqa-bench"))}
    )
    flavours = MappingProxyType({"vlmevalkit": Flavour(_vlmevalkit), "official": Flavour(_official)})
    headline = "mean of parts"

    def question(self, layout: str, number: int, record: Record) -> Question:
        """A question of a part, which the column or the file's name says."""
        if layout == "vlmevalkit":
            part, id, images, gold = record["split"], record["index"], record["images"], record.text("answer")
        else:
            part = record.get("split") or record["__file__"].removesuffix(".parquet").partition("-")[0]
            id, images, gold = record.text("qa_id"), [record.image("image")], record.text("gt")
        if part not in PROMPTS:
            raise record.wrong("split", f"must be one of {', '.join(PROMPTS)}, not {part!r}")
        return Question(f"{part}/{id}", record.text("question"), images, {"part": part, "answers": [gold]})

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """The score by the part's metric, and exact accuracy too where that metric ignores units."""
        part = gold["part"]
        if flavour == "vlmevalkit":
            reply = reply.removeprefix("Answer: ")
        value = find_metric(METRICS[part])(reply, gold["answers"])
        scores = {"mean of items": (value, 1.0), part: (value, 1.0)}
        if part == "fintabnetqa":
            scores["fintabnetqa (exact)"] = (find_metric("fintabnetqa_exact")(reply, gold["answers"]), 1.0)
        if part == "vtabfact":
            said_both = "true" in reply.lower() and "false" in reply.lower()
            scores["vtabfact (both words)"] = (float(said_both), 1.0)
        return scores

    def combine(self, rates: dict[str, Any]) -> dict[str, Any]:
        """The mean of the parts that there are, in front."""
        parts = [rates[part] for part in PROMPTS if part in rates]
        return {self.headline: sum(parts) / len(parts), **rates}
