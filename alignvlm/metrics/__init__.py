"""Scores of one generated answer against its accepted answers: one file per metric and a registry.

ANLS follows the DocVQA evaluator and relaxed accuracy the ChartQA one, so that numbers can stand beside published ones.
"""

from __future__ import annotations

from alignvlm.metrics import anls, exact_match, relaxed_accuracy  # noqa: F401  # each registers its metric
from alignvlm.metrics.registry import Metric, find_metric, metric_names, register_metric

__all__ = ["Metric", "find_metric", "metric_names", "register_metric"]
