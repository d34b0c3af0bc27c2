"""InfographicVQA, validation: questions about infographics, by ANLS."""

from __future__ import annotations

from types import MappingProxyType

from alignvlm.evaluation.benchmarks.base import register_benchmark
from alignvlm.evaluation.benchmarks.document.docvqa import DocVQA
from alignvlm.evaluation.benchmarks.readers import Docowl, Parquet, Tsv


@register_benchmark
class InfoVQA(DocVQA):
    """2,801 questions; files, prompts and metric as DocVQA's."""

    name = "infovqa"
    title = "InfoVQA"
    published_items = 2801
    sources = MappingProxyType(
        {
            "huggingface": Parquet(("validation",), "InfographicVQA", siblings=("DocVQA",)),
            "vlmevalkit": Tsv(("InfoVQA_VAL",)),
            "docdownstream": Docowl("InfographicsVQA"),
            "ureader": Docowl("InfographicsVQA"),
        }
    )
