"""VCR-wiki in English: restore the covered words of a caption, with parts of the letters visible."""

from __future__ import annotations

from types import MappingProxyType

from alignvlm.evaluation.benchmarks.base import Benchmark, Flavour, Gold, Question, Scores, register_benchmark
from alignvlm.evaluation.benchmarks.readers import Parquet, Record, Tsv
from alignvlm.metrics.relaxed_accuracy import answers_in_cell
from alignvlm.metrics.vcr import score_blanks

ASK = "What is the covered texts in the image? Please restore the covered texts without outputting the explanations."


class VCR(Benchmark):
    """5,000 pictures, or the first 500 or 100; the score is the mean over all covered texts."""

    published_items = 5000
    flavours = MappingProxyType({"vlmevalkit": Flavour("{}"), "lmms_eval": Flavour(ASK, max_new_tokens=120)})
    headline = "exact match"

    def expected_items(self, layout: str) -> tuple[int, ...]:
        """The whole set and its published beginnings."""
        return (self.published_items, 500, 100)

    def question(self, layout: str, number: int, record: Record) -> Question:
        """The picture above its caption. Parquet files hold no question: lmms-eval's is asked."""
        if layout == "vlmevalkit":
            id, text, images = record.text("index"), record["question"].strip(), record["images"]
            blanks = answers_in_cell(record.text("answer"))
            if not text:
                raise record.wrong("question", "is empty: use --flavour lmms_eval with the parquet files")
        else:
            id, text, images = record.text("question_id"), ASK, [record.image("stacked_image")]
            blanks = record.texts("crossed_text")
        return Question(id, text, images, {"blanks": blanks})

    def score(self, reply: str, gold: Gold, flavour: str) -> Scores:
        """Exact matches and Jaccard indices of the picture's covered texts."""
        blanks = score_blanks(reply, gold["blanks"])
        exact, jaccard = sum(blank.exact_match for blank in blanks), sum(blank.jaccard for blank in blanks)
        return {"exact match": (exact, len(blanks)), "jaccard": (jaccard, len(blanks))}


@register_benchmark
class VCREasy(VCR):
    """VCR-wiki-en-easy."""

    name = "vcr_en_easy"
    title = "VCR en easy"
    sources = MappingProxyType(
        {
            "huggingface": Parquet(("test",), not_in_name="hard"),
            "vlmevalkit": Tsv(("VCR_EN_EASY_ALL", "VCR_EN_EASY_500", "VCR_EN_EASY_100", "VCR-wiki-en-easy-test")),
        }
    )


@register_benchmark
class VCRHard(VCR):
    """VCR-wiki-en-hard."""

    name = "vcr_en_hard"
    title = "VCR en hard"
    sources = MappingProxyType(
        {
            "huggingface": Parquet(("test",), not_in_name="easy"),
            "vlmevalkit": Tsv(("VCR_EN_HARD_ALL", "VCR_EN_HARD_500", "VCR_EN_HARD_100", "VCR-wiki-en-hard-test")),
        }
    )
