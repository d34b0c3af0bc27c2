"""The nine document benchmarks of the paper's Table 2."""

from __future__ import annotations

from alignvlm.evaluation.benchmarks.document import (  # noqa: F401  # each registers its benchmark
    chartqa,
    deepform,
    docvqa,
    infovqa,
    klc,
    tabfact,
    tablevqabench,
    textvqa,
    wtq,
)
