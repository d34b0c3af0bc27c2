"""Where the files are that come with the code: recipes, DeepSpeed strategies, launch files, templates, the demo."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
_BUNDLED = PACKAGE / "_resources"
"""Exists in an installed wheel only: setup.py copies the top-level folders of the checkout there."""
_TOP_LEVEL = _BUNDLED if _BUNDLED.is_dir() else PACKAGE.parent

FOLDERS = {
    "recipes": PACKAGE / "recipes",
    "templates": PACKAGE / "report" / "templates",
    "page": PACKAGE / "serving" / "demo" / "page",
    "ds_configs": _TOP_LEVEL / "ds_configs",
    "launch": _TOP_LEVEL / "launch",
}


def resource(folder: str, *names: str) -> Path:
    """Path of a file or of the whole folder, in a checkout and in an installed wheel; it need not exist.

    `folder` is a key of `FOLDERS`; `names` lead to the file, for example `resource("launch", "slurm/train.sbatch")`.
    """
    return FOLDERS[folder].joinpath(*names)
