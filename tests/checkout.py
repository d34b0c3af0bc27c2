"""A copy of this checkout's files, for tests that build or release it: nothing is written into the checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("alignvlm", "data_pipeline", "benchmarks", "docs", "ds_configs", "examples", "launch", "scripts", "tests")


def copy_checkout(target: Path) -> Path:
    """Copy the files and folders that belong to the repository into `target`, which is made; returns it."""
    target.mkdir(parents=True)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy2(path, target)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    return target
