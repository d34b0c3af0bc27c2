"""Indexed WebDataset shards, and a training order that is a pure function: plan, packing, loader.

Knows nothing of models: an `Encoder` measures and encodes samples. The names below are imported on first use, so that
importing the package, or planning with `data_pipeline.order`, needs numpy only.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.errors import DataError
    from data_pipeline.loading.loader import build_loader
    from data_pipeline.order.plan import Plan
    from data_pipeline.order.settings import PlanSettings
    from data_pipeline.samples.schema import Encoder, Sample, SampleError
    from data_pipeline.shards.index import index_shards
    from data_pipeline.shards.reader import SourceReader
    from data_pipeline.shards.sources import measure_source, open_source
    from data_pipeline.shards.writer import write_shards

__all__ = [
    "DataError",
    "Encoder",
    "Plan",
    "PlanSettings",
    "Sample",
    "SampleError",
    "SourceReader",
    "build_loader",
    "index_shards",
    "measure_source",
    "open_source",
    "write_shards",
]

_HOMES = {
    "DataError": "errors",
    "Encoder": "samples.schema",
    "Plan": "order.plan",
    "PlanSettings": "order.settings",
    "Sample": "samples.schema",
    "SampleError": "samples.schema",
    "SourceReader": "shards.reader",
    "build_loader": "loading.loader",
    "index_shards": "shards.index",
    "measure_source": "shards.sources",
    "open_source": "shards.sources",
    "write_shards": "shards.writer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
