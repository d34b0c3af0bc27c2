"""AlignVLM: a distributed training stack for document vision-language models.

The names below are imported on first use, so that `import alignvlm` loads nothing heavy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignvlm.config import load_recipe
    from alignvlm.connectors import Connector, ConnectorOptions
    from alignvlm.connectors import register as register_connector
    from alignvlm.errors import UserError
    from alignvlm.evaluation.evaluate import evaluate
    from alignvlm.metrics import register_metric
    from alignvlm.model import (
        AlignVLMConfig,
        AlignVLMForConditionalGeneration,
        AlignVLMImageProcessor,
        AlignVLMProcessor,
    )
    from alignvlm.report.report import build_report
    from alignvlm.training.callbacks import Callback, StageState
    from alignvlm.training.record import StepRecord
    from alignvlm.training.run import train

__version__ = "0.1.0"

__all__ = [
    "AlignVLMConfig",
    "AlignVLMForConditionalGeneration",
    "AlignVLMImageProcessor",
    "AlignVLMProcessor",
    "Callback",
    "Connector",
    "ConnectorOptions",
    "StageState",
    "StepRecord",
    "UserError",
    "build_report",
    "evaluate",
    "load_recipe",
    "register_connector",
    "register_metric",
    "train",
]

_HOMES = {
    "AlignVLMConfig": "model",
    "AlignVLMForConditionalGeneration": "model",
    "AlignVLMImageProcessor": "model",
    "AlignVLMProcessor": "model",
    "Callback": "training.callbacks",
    "Connector": "connectors",
    "ConnectorOptions": "connectors",
    "StageState": "training.callbacks",
    "StepRecord": "training.record",
    "UserError": "errors",
    "build_report": "report.report",
    "evaluate": "evaluation.evaluate",
    "load_recipe": "config",
    "register_metric": "metrics",
    "train": "training.run",
}


def __getattr__(name: str) -> Any:
    if name == "register_connector":
        return importlib.import_module("alignvlm.connectors").register
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
