"""DeepForm, test: five fields of political advertisement receipts."""

from __future__ import annotations

from types import MappingProxyType

from alignvlm.evaluation.benchmarks.base import register_benchmark
from alignvlm.evaluation.benchmarks.document.forms import Forms
from alignvlm.evaluation.benchmarks.readers import Docowl


@register_benchmark
class DeepForm(Forms):
    """300 documents with 5 fields each, by what the size of the file suggests."""

    name = "deepform"
    title = "DeepForm"
    published_items = 1500
    sources = MappingProxyType({"docdownstream": Docowl("DeepForm"), "ureader": Docowl("DeepForm")})
    keys = ("advertiser", "flight_from", "flight_to", "gross_amount", "contract_num")
