"""Scores of generated answers against their accepted answers: the metrics of tasks and of the published benchmarks.

Each follows the evaluator that its name says, so that numbers can stand beside published ones.
"""

from __future__ import annotations

from alignvlm.metrics import anls, exact_match, relaxed_accuracy, vqa  # noqa: F401  # each registers its metrics
from alignvlm.metrics.registry import Metric, find_metric, metric_names, register_metric
from alignvlm.metrics.tables import denotation, tabfact, tablevqabench  # noqa: F401

__all__ = ["Metric", "find_metric", "metric_names", "register_metric"]
