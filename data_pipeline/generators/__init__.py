"""Built-in generators of real data for the quickstart: form fields, price tags, table crops and bar charts.

Each is a pure function of its arguments (no global random state) and yields records for `shards.writer`. A new one is
a module with `generate` and one entry of GENERATORS, which a user's own program may add too. Modules are imported on
first use, because they read scikit-learn's, statsmodels' and vega-datasets' files.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from data_pipeline.errors import ArgumentError, DataError, did_you_mean, nearest

Generator = Callable[..., Iterator[dict[str, Any]]]

GENERATORS: dict[str, str | Generator] = {
    "fields": "data_pipeline.generators.fields",
    "tables": "data_pipeline.generators.tables",
    "charts": "data_pipeline.generators.charts",
    "printed": "data_pipeline.generators.printed",
}
"""Name -> generate(split="train"|"heldout", num_samples, seed, kind="transcribe"|"questions", …), or its module."""


def generate(name: str, **args: Any) -> Iterator[dict[str, Any]]:
    """The records of the generator `name`, made one by one. Raises DataError as `check_arguments` does."""
    function = check_arguments(name, args)
    try:
        return function(**args)
    except ImportError as error:
        raise DataError(f"the generator needs a package: {error} (pip install 'alignvlm[quickstart]')") from error


def check_arguments(name: str, args: Mapping[str, Any]) -> Generator:
    """The generator `name`, if it takes these arguments: by their names, their types and, for ours, their values.

    Raises:
        ArgumentError: for the first that it does not take. DataError: there is no such generator.
    """
    if name not in GENERATORS:
        raise DataError(f"unknown generator {name!r}: {nearest(name, sorted(GENERATORS))}")
    entry = GENERATORS[name]
    function: Generator = importlib.import_module(entry).generate if isinstance(entry, str) else entry
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for argument, value in args.items():
        if argument not in parameters and not takes_any:
            hint = did_you_mean(argument, parameters) or f"known: {', '.join(parameters)}"
            raise ArgumentError(f"generator {name!r}: unknown argument {argument!r}: {hint}", argument)
        _check_type(name, function, argument, value)
    for argument, parameter in parameters.items():
        named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        if named and parameter.default is parameter.empty and argument not in args:
            raise ArgumentError(f"generator {name!r}: the argument {argument!r} is missing")
    if isinstance(entry, str):
        function(**args)  # ours check values at once, and make records only when they are asked for
    return function


def _check_type(name: str, function: Generator, argument: str, value: Any) -> None:
    """Compare a value with the annotation of its argument; one that cannot be understood allows any."""
    import typing

    from pydantic import ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError

    try:
        kind = typing.get_type_hints(function).get(argument, Any)
        adapter = TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True))
    except (NameError, TypeError, PydanticSchemaGenerationError):
        return
    try:
        adapter.validate_python(value)
    except ValidationError as error:
        said = error.errors(include_url=False)[0]
        place = "".join(f"[{step!r}]" for step in said["loc"] if isinstance(step, int) or step in (value or ()))
        what = said["msg"].removeprefix("Input should be ")
        raise ArgumentError(
            f"generator {name!r}: {argument}{place} is {said['input']!r:.80}, but must be {what}", argument
        ) from error
