"""Kleister Charity (KLC), test: eight fields of annual reports."""

from __future__ import annotations

from types import MappingProxyType

from alignvlm.evaluation.benchmarks.base import register_benchmark
from alignvlm.evaluation.benchmarks.document.forms import Forms
from alignvlm.evaluation.benchmarks.readers import Docowl


@register_benchmark
class KleisterCharity(Forms):
    """609 documents with 8 fields each; a question shows one page, the references are of the whole report."""

    name = "klc"
    title = "KLC"
    published_items = 4872
    sources = MappingProxyType({"docdownstream": Docowl("KleisterCharity"), "ureader": Docowl("KleisterCharity")})
    keys = (
        "address__post_town", "address__postcode", "address__street_line", "charity_name", "charity_number",
        "income_annually_in_british_pounds", "report_date", "spending_annually_in_british_pounds",
    )  # fmt: skip
