"""Built-in generators of real data for the quickstart: handwritten form fields, table crops and bar charts.

Each is a pure function of its arguments (no global random state) and yields records for `shards.writer`. A new one is
a module with `generate` and one entry of GENERATORS, which a user's own program may add too. Modules are imported on
first use, because they read scikit-learn's, statsmodels' and vega-datasets' files.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from data_pipeline.errors import DataError, nearest


def _lazy(module: str) -> Callable[..., Iterator[dict[str, Any]]]:
    def generate_records(**args: Any) -> Iterator[dict[str, Any]]:
        try:
            function = importlib.import_module(f"{__name__}.{module}").generate
        except ImportError as error:
            raise DataError(f"the generator needs a package: {error} (pip install 'alignvlm[quickstart]')") from error
        return function(**args)

    return generate_records


GENERATORS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "fields": _lazy("fields"),
    "tables": _lazy("tables"),
    "charts": _lazy("charts"),
}
"""Name -> generate(split="train"|"heldout", num_samples, seed, kind="transcribe"|"questions", …)."""


def generate(name: str, **args: Any) -> Iterator[dict[str, Any]]:
    """Yield the records of the generator `name`; unknown names and arguments raise DataError."""
    if name not in GENERATORS:
        raise DataError(f"unknown generator {name!r}: {nearest(name, sorted(GENERATORS))}")
    try:
        return GENERATORS[name](**args)
    except TypeError as error:
        raise DataError(f"generator {name!r}: {error}") from error
