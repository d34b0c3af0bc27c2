"""Published benchmarks from their public files: each asks, scores and reports as the evaluators of the paper do."""

from __future__ import annotations

from alignvlm.evaluation.benchmarks import document, general  # noqa: F401  # register their benchmarks
from alignvlm.evaluation.benchmarks.base import Benchmark, benchmark_names, find_benchmark, register_benchmark

__all__ = ["Benchmark", "benchmark_names", "find_benchmark", "register_benchmark"]
