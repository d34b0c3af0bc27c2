"""The paper's general benchmarks and VCR, and MMLU for what the language model has kept."""

from __future__ import annotations

from alignvlm.evaluation.benchmarks.general import (  # noqa: F401  # each registers its benchmark
    gqa,
    mmlu,
    mmmu,
    mmvet,
    pope,
    seedbench,
    vcr,
)
