"""The user's own modules, which register connectors, metrics, importers or storage."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from alignvlm.errors import UserError
from data_pipeline.files import reason

VARIABLE = "ALIGNVLM_IMPORTS"
"""Environment variable with further modules, separated by commas, for commands that read no recipe."""


def import_plugins(names: Iterable[str] = ()) -> None:
    """Import the modules `names` and those of ALIGNVLM_IMPORTS, each once.

    A name is `package.module`, looked up from the working directory too, or the path of a file that ends in `.py`.

    Raises:
        UserError: there is no such module, or importing it failed.
    """
    for name in [*names, *os.environ.get(VARIABLE, "").split(",")]:
        if name.strip():
            _import(name.strip())


def _import(name: str) -> None:
    try:
        if name.endswith(".py"):
            _import_file(Path(name))
            return
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        importlib.import_module(name)
    except Exception as error:  # a module may raise anything
        said = f"{_where(error)}{reason(error)}"
        raise UserError(
            f"imports: {name!r} cannot be imported ({said}); give a module or the path of a .py file"
        ) from error


def _where(error: Exception) -> str:
    """File and line of the module that raised; empty where no module was found or Python's own message names them."""
    if isinstance(error, ImportError | OSError | SyntaxError):
        return ""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{last.filename}:{last.lineno}: {type(error).__name__}: "


def _import_file(path: Path) -> None:
    module = path.stem
    known = sys.modules.get(module)
    if known is not None and Path(getattr(known, "__file__", None) or "").resolve() == path.resolve():
        return
    specification = importlib.util.spec_from_file_location(module, path.resolve())
    if known is not None or specification is None or specification.loader is None:
        raise ImportError(f"a module {module!r} is loaded already, from elsewhere")
    loaded = importlib.util.module_from_spec(specification)
    sys.modules[module] = loaded
    try:
        specification.loader.exec_module(loaded)
    except BaseException:
        del sys.modules[module]
        raise
