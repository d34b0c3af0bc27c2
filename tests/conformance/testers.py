"""transformers' own tests, from the folders in CHECK_HF_TESTS; those that are left out are empty classes."""

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
FOLDERS = [Path(folder) for folder in os.environ["CHECK_HF_TESTS"].split(os.pathsep)]
"""Where a module is looked for, the first one first."""
STAND_INS = {
    # Exports to ONNX and ExecuTorch, which are slow and need packages of their own.
    f"{PACKAGE}.exporters.test_export": ("ExportTesterMixin", "ExportGenerateTesterMixin"),
    "fetch_hub_objects_for_ci": ("url_to_local_path",),  # pictures of the hub: one picture takes their place
}
"""Modules that are left out, and what the others import from them."""
if not any((folder / "generation/test_utils.py").is_file() for folder in FOLDERS):
    STAND_INS[f"{PACKAGE}.generation.test_utils"] = ("GenerationTesterMixin",)


def _picture(url: str) -> str:
    """A picture's file, whichever URL is asked for."""
    path = FOLDERS[0] / "picture.png"
    if not path.is_file():
        picture(320, 240).save(path)
    return str(path)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules that are left out."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        wanted = any(module == name or module.startswith(name + ".") for module in STAND_INS)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def exec_module(self, module: types.ModuleType) -> None:
        for name in STAND_INS.get(module.__name__, ()):
            setattr(module, name, _picture if name.islower() else type(name, (), {}))


def load(module: str) -> Any:
    """A module of transformers' tests."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(folder) for folder in FOLDERS]
        sys.modules[PACKAGE] = package
        sys.meta_path.insert(0, _StandIns())
        for name in ("exporters", "exporters.test_export"):  # which one of them imports as `tests.exporters`
            sys.modules[f"tests.{name}"] = importlib.import_module(f"{PACKAGE}.{name}")
    return importlib.import_module(f"{PACKAGE}.{module}")
