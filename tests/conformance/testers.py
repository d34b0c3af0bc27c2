"""transformers' own tests, from the folder in CHECK_HF_TESTS; classes that are missing there are empty."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from pathlib import Path
from typing import Any

from tests.tiny import picture

PACKAGE = "transformers_tests"
"""What these tests are imported as: their own name, `tests`, is ours too."""
STAND_INS = {
    f"{PACKAGE}.exporters.test_export": ("ExportTesterMixin",),
    f"{PACKAGE}.generation.test_utils": ("GenerationTesterMixin",),
    "fetch_hub_objects_for_ci": ("url_to_local_path",),  # pictures of the hub: one picture takes their place
}
"""Modules that transformers' source distribution leaves out, and what the others import from them."""


def _picture(url: str) -> str:
    """A picture's file, whichever URL is asked for."""
    path = Path(os.environ["CHECK_HF_TESTS"]) / "picture.png"
    if not path.is_file():
        picture(320, 240).save(path)
    return str(path)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules that are not there; asked after all other finders."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        wanted = any(module == name or module.startswith(name + ".") for module in STAND_INS)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def exec_module(self, module: types.ModuleType) -> None:
        for name in STAND_INS.get(module.__name__, ()):
            setattr(module, name, _picture if name.islower() else type(name, (), {}))


def load(module: str) -> Any:
    """A module of transformers' tests."""
    folder = Path(os.environ["CHECK_HF_TESTS"])
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(folder)]
        sys.modules[PACKAGE] = package
        sys.meta_path.append(_StandIns())
    return importlib.import_module(f"{PACKAGE}.{module}")
